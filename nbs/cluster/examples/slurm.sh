#!/usr/bin/env bash
# Ray for the time of a Slurm job, and a sweep on it. From the root of a checkout on a file system that all nodes share,
# with a virtual environment .venv in it:
#   sbatch nbs/cluster/examples/slurm.sh --seeds 0-4
# Submitted again after its time was up, it goes on where it was.
#SBATCH --job-name=digiq
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# shellcheck disable=SC1091
source .venv/bin/activate
umask 077

# Other people's jobs run on these nodes, too: without the token nobody gets in.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
python -c "import secrets; print(secrets.token_hex(32), end='')" > "$RAY_AUTH_TOKEN_PATH"

# The first node is the head. A port of the job's own, in case two jobs share a node; a run takes two CPUs.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" ray symmetric-run \
    --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$((SLURM_CPUS_PER_TASK / 2))" --dashboard-host 127.0.0.1 \
    -- digiq sweep --cluster auto "$@"
