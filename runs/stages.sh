# The stages of every run in this folder; the scripts that source this file say which.
#
#   bash runs/NAME.sh download        the model and the data; nothing else opens a connection
#   bash runs/NAME.sh [FLAGS]         plan, evaluate, train, evaluate and compare, export
#
# FLAGS go to train_grpo.py. The same command continues, and only prints what is finished.
# Environment: MODEL (folder to start from), RUN (folder of all results), NPROC (processes),
# EVALUATE (flags for evaluate.py); on several machines NODES, HOST (the first), NODE (0 on it);
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT (seconds from a SIGTERM until torchrun kills what has not ended).
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    for file in "$0" "${BASH_SOURCE[0]}"; do
        sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$file"
        echo
    done
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MODEL="${MODEL:-models/${HUB#*/}}"
RUN="${RUN:-runs/$PRESET}"
NODES="${NODES:-1}"
# torchrun's own 30 s would kill the ranks before a step ends and is saved.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}"

if [ "${1:-}" = download ]; then
    for name in $DATA; do python -m nanomath.hub.download "$name" --to data; done
    exec python -m nanomath.hub.download "$HUB" --revision "${REVISION:-main}" --to "$MODEL"
fi
if [ ! -e "$MODEL/config.json" ]; then
    echo "$MODEL holds no model: bash $0 download, or MODEL=FOLDER bash $0" >&2
    exit 1
fi

launch() {
    local all=(--nproc_per_node "$NPROC" --max-restarts 3)
    if [ "$NODES" -gt 1 ]; then
        torchrun --nnodes "$NODES" "${all[@]}" --rdzv_backend c10d --rdzv_id "$PRESET" \
            --rdzv_endpoint "${HOST:?must name the first machine}:29500" "$@"
    elif [ "$NPROC" -gt 1 ]; then
        torchrun --standalone "${all[@]}" "$@"
    else
        python "$@"
    fi
}

# Without this, bash goes on to the next stage when Ctrl-C finds one in its last moments.
trap 'echo "interrupted; the same command continues" >&2; exit 130' INT

evaluate() {
    # shellcheck disable=SC2086 # EVALUATE is several words
    launch evaluate.py --preset "$PRESET" ${EVALUATE:-} "$@"
}

if [ "${NODE:-0}" = 0 ]; then
    python -m nanomath.measure.plan --preset "$PRESET" --stages grpo --shape "$MODEL/config.json" \
        --num_gpus "$((NPROC * NODES))"
fi
evaluate --checkpoint "$MODEL" --out "$RUN/before.json"
launch train_grpo.py --preset "$PRESET" --init "$MODEL" --run_dir "$RUN" "$@"
evaluate --checkpoint "$RUN" --compare "$RUN/before.json" --out "$RUN/after.json"
# Anew where training went on since: a signal ends it early, and what follows is of that step.
sealed=("$RUN"/checkpoints/step-*/COMMIT)
if [ "${NODE:-0}" = 0 ] && [ ! "$RUN/exported" -nt "${sealed[-1]}" ]; then
    rm -rf "$RUN/exported"
    python -m nanomath.play.export --checkpoint "$RUN" --out "$RUN/exported"
fi
