# shellcheck shell=bash
# What your cluster needs before it can train. Copy this to slurm/site.sh, which slurm/train.sh sources at the start of each job, on
# the first node (SITE_FILE=FILE names another file), and keep what you need. What is exported here reaches all ranks.

# --- environment modules. `module` is not defined in a job whose shell is not a login shell, or if yours is csh:
# source /etc/profile.d/modules.sh
# module purge
# module load cuda/12.6 nccl

# --- a conda environment instead of .venv/ (install the package in it: pip install -e .):
# source "$HOME/miniforge3/etc/profile.d/conda.sh"
# conda activate trainer
# export PYTHON=$CONDA_PREFIX/bin/python

# --- caches: downloads from the Hub, and tokenised data, on a large disk that all nodes share:
# export HF_HOME=/scratch/$USER/huggingface DIST_TRAINER_CACHE=/scratch/$USER/dist_trainer
# export HF_HUB_OFFLINE=1 # if the nodes have no network

# --- the network. If the first node's name leads to a slow or closed one, name another way to it; gloo follows:
# MASTER_ADDR=$(hostname -s)-ib0
# If gloo or NCCL still take the wrong interface:
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5_0,mlx5_1

# --- a container. This folder, output_dir and the caches must have the same paths inside. PYTHON, outside the container, reads the
# config; RANKS_PYTHON is the Python inside.
# RANKS_PYTHON=python3
#
# Pyxis, the plugin of srun that starts enroot containers (enroot alone passes on neither the environment nor the folder):
# SRUN_OPTIONS="--container-image=$PWD/trainer.sqsh --container-mounts=$PWD,/scratch --container-workdir=$PWD"
#
# Apptainer is a command in front of the command:
# CONTAINER_COMMAND="apptainer exec --nv --bind $PWD,/scratch --pwd $PWD trainer.sif"

# --- any other options of srun:
# SRUN_OPTIONS="--cpu-bind=none --mpi=none"
