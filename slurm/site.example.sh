# shellcheck shell=bash
# What your cluster needs before it can train. Copy this to slurm/site.sh, which slurm/train.sh reads in each job's first shell
# (SITE_FILE=FILE names another), and keep what fits; what is exported here reaches all ranks.

# --- modules, where the cluster has them. Without a login shell `module` must be defined first:
# source /etc/profile.d/modules.sh
# module purge
# module load cuda/12.6 nccl

# --- an environment of conda's instead of .venv/ (install the package in it: pip install -e .):
# source "$HOME/miniforge3/etc/profile.d/conda.sh"
# conda activate trainer
# export PYTHON=$CONDA_PREFIX/bin/python

# --- data: what comes from the Hub, and tokenised data, on a disk that all nodes share and that has room:
# export HF_HOME=/scratch/$USER/huggingface DIST_TRAINER_CACHE=/scratch/$USER/dist_trainer
# export HF_HUB_OFFLINE=1 # where nodes have no network

# --- the network, if gloo or NCCL take the wrong one:
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5_0,mlx5_1

# --- a container. This folder, output_dir and the caches must have the same paths inside. PYTHON, outside, reads the config;
# RANKS_PYTHON is the Python inside.
# RANKS_PYTHON=python3
#
# Pyxis (with enroot) is a plugin of srun:
# SRUN_OPTIONS="--container-image=$PWD/trainer.sqsh --container-mounts=$PWD,/scratch --container-workdir=$PWD"
#
# Apptainer is a command before the command:
# CONTAINER_COMMAND="apptainer exec --nv --bind $PWD,/scratch --pwd $PWD trainer.sif"
#
# enroot by itself, with an image that was created on each node (enroot create --name trainer trainer.sqsh):
# CONTAINER_COMMAND="enroot start --rw --mount $PWD --mount /scratch trainer"

# --- anything else that srun should be told:
# SRUN_OPTIONS="--cpu-bind=none --mpi=none"
