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

# --- the network. If the first node's name leads to a slow or closed one, name another way to it; gloo follows:
# MASTER_ADDR=$(hostname -s)-ib0
# If gloo or NCCL still take the wrong interface:
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5_0,mlx5_1

# --- a container. This folder, output_dir and the caches must have the same paths inside. PYTHON, outside, reads the config;
# RANKS_PYTHON is the Python inside.
# RANKS_PYTHON=python3
#
# Pyxis, the plugin of srun that starts enroot containers (enroot alone passes on neither the environment nor the folder):
# SRUN_OPTIONS="--container-image=$PWD/trainer.sqsh --container-mounts=$PWD,/scratch --container-workdir=$PWD"
#
# Apptainer is a command before the command:
# CONTAINER_COMMAND="apptainer exec --nv --bind $PWD,/scratch --pwd $PWD trainer.sif"

# --- anything else that srun should be told:
# SRUN_OPTIONS="--cpu-bind=none --mpi=none"
