#!/usr/bin/env bash
# The whole of DeepSeekMath in one command: web pages -> corpus -> tokenizer -> base model -> SFT ->
# GRPO -> evaluation, at the size of the machine. Each line under "stages" is a command you can run
# by itself. A second call continues: finished stages are skipped, an interrupted one resumes.
set -euo pipefail
CALLER_DIR="$PWD"
CDPATH="" cd -- "$(dirname "$0")"
source dev/setup.sh

usage() {
    cat <<USAGE
usage: bash speedrun.sh [--preset smoke|cpu|gpu] [--seed N] [--run_dir DIR] [--table1]

  --preset smoke   a minute or two: every stage, far too small to learn anything
  --preset cpu     under 20 minutes on two cores (default without an NVIDIA GPU)
  --preset gpu     one NVIDIA GPU (default where there is one)
  --seed N         seed of weights, solutions, data order and samples [0]
  --run_dir DIR    where everything is written [runs/speedrun-PRESET, with -seedN after it]
  --table1         up to SFT only, then Table 1 at small scale: does the recalled corpus beat its seed
                   and random pages? Takes up what is in the folder, and trains three models more

Environment: PYTHON (interpreter for the virtual environment), VENV (its folder, .venv),
TORCH (another release of torch than constraints.txt's, such as 2.14.1; its own triton comes along),
NANOMATH_DATA (folder of public benchmarks to decontaminate against).
USAGE
}

refuse() { echo "speedrun.sh: $1 (see bash speedrun.sh --help)" >&2; exit 2; }

PRESET=""
SEED=0
RUN=""
TABLE1=no
while [ $# -gt 0 ]; do
    case "$1" in --preset | --seed | --run_dir) [ -n "${2:-}" ] || refuse "$1 needs a value" ;; esac
    case "$1" in
        --preset) PRESET="$2"; shift 2 ;;
        --seed) SEED="$2"; shift 2 ;;
        --run_dir) RUN=$(from_caller "$2"); shift 2 ;;
        --table1) TABLE1=yes; shift ;;
        -h | --help) usage; exit 0 ;;
        *) refuse "unknown argument $1" ;;
    esac
done
if [ -z "$PRESET" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then PRESET=gpu; else PRESET=cpu; fi
fi
case "$PRESET" in
    smoke | cpu | gpu) ;;
    *) refuse "--preset is '$PRESET', but must be smoke, cpu or gpu" ;;
esac
[[ "$SEED" =~ ^[0-9]{1,9}$ ]] || refuse "--seed is '$SEED', but must be a whole number"
if [ "$SEED" = 0 ]; then RUN="${RUN:-runs/speedrun-$PRESET}"; else RUN="${RUN:-runs/speedrun-$PRESET-seed$SEED}"; fi
# The control's steps take about as long as GRPO does: the report shows the minutes of both.
case "$PRESET" in smoke) CONTROL_STEPS=20 ;; cpu) CONTROL_STEPS=2300 ;; gpu) CONTROL_STEPS=4000 ;; esac
FIGURE7_PROBLEMS=200 # the first of the held-out ones, 64 samples each
if [ "$PRESET" = smoke ]; then FIGURE7_PROBLEMS=10; fi

setup_environment ""
mkdir -p "$RUN" 2>/dev/null && [ -w "$RUN" ] || refuse "cannot write $RUN: choose another folder with --run_dir"
PY="$VENV/bin/python"

# stage NAME COMMAND...: run it, and note its wall time for the table at the end.
stage() {
    STAGE="$1" STARTED=$SECONDS
    shift
    say "$STAGE"
    "$@" || { local code=$?; echo "speedrun.sh: stage '$STAGE' ended with code $code; the same command continues it" >&2; exit "$code"; }
    note_time
}
note_time() {
    # Of a finished run only table 1 is still timed: finding the rest done is not part of the run.
    if [ -n "$STAGE" ] && { [ "$FINISHED" = no ] || [[ "$STAGE" == "table 1"* ]]; }; then
        printf '%s\t%s\n' "$STAGE" "$((SECONDS - STARTED))" >>"$RUN/seconds.tsv"
    fi
    STAGE=""
}
STAGE=""
if [ -f "$RUN/report.md" ]; then FINISHED=yes; else FINISHED=no; fi
trap note_time EXIT # of a stage that is cut, too: the call that continues it takes only what is left

BENCHMARKS=()
if [ -n "${NANOMATH_DATA:-}" ]; then
    for name in gsm8k_test math_test cmath_test gaokao_mathqa gaokao_mathcloze; do
        if [ -f "$NANOMATH_DATA/$name.jsonl" ]; then BENCHMARKS+=("$NANOMATH_DATA/$name.jsonl"); fi
    done
fi
if [ ${#BENCHMARKS[@]} -gt 0 ]; then BENCHMARKS=(--benchmarks "${BENCHMARKS[@]}"); fi

# Without this, bash goes on to the next stage when Ctrl-C finds one in its last moments.
trap 'echo "speedrun.sh: interrupted; the same command continues" >&2; exit 130' INT
# A stage that is asked to stop saves first: bash waits for it, then ends, too (timeout, Slurm).
trap 'echo "speedrun.sh: stopped; the same command continues" >&2; exit 143' TERM

# ---- stages -----------------------------------------------------------------------------------
stage corpus    "$PY" build_corpus.py --preset "$PRESET" --run_dir "$RUN/corpus" ${BENCHMARKS[@]+"${BENCHMARKS[@]}"}
if [ ! -f "$RUN/solutions.jsonl" ]; then # it appears when it is complete
    stage solutions "$PY" -m nanomath.tasks.countdown --preset "$PRESET" --seed "$SEED" --out "$RUN/solutions.jsonl"
fi
stage tokenizer "$PY" -m nanomath.text.tokenizer --preset "$PRESET" --corpus "$RUN/corpus/corpus.jsonl" \
                    --solutions "$RUN/solutions.jsonl" --out "$RUN/tokenizer"
stage pretrain  "$PY" train_pretrain.py --preset "$PRESET" --corpus "$RUN/corpus/corpus.jsonl" \
                    --valid "$RUN/corpus/valid.jsonl" --tokenizer "$RUN/tokenizer" --seed "$SEED" --run_dir "$RUN/base"
stage sft       "$PY" train_sft.py --preset "$PRESET" --init "$RUN/base" --data "$RUN/solutions.jsonl" \
                    --seed "$SEED" --run_dir "$RUN/sft"
if [ "$TABLE1" = yes ]; then
    stage "evaluate sft" "$PY" evaluate.py --preset "$PRESET" --checkpoint "$RUN/sft" --out "$RUN/eval-sft.json"
    stage "table 1 pages" "$PY" nanomath/measure/table1.py --write pages --run_dir "$RUN"
    for name in random seed recalled; do
        folder="$RUN/table1/$name"
        stage "table 1 $name: pretrain" "$PY" train_pretrain.py --preset "$PRESET" --corpus "$folder/pages.jsonl" \
                    --valid "$RUN/corpus/valid.jsonl" --tokenizer "$RUN/tokenizer" --seed "$SEED" --run_dir "$folder/base"
        stage "table 1 $name: sft" "$PY" train_sft.py --preset "$PRESET" --init "$folder/base" --data "$RUN/solutions.jsonl" \
                    --seed "$SEED" --run_dir "$folder/sft"
        stage "table 1 $name: evaluate" "$PY" evaluate.py --preset "$PRESET" --checkpoint "$folder/sft" \
                    --num_samples 0 --out "$folder/eval.json"
    done
    stage "table 1" "$PY" nanomath/measure/table1.py --write table --run_dir "$RUN"
    exit
fi
stage control   "$PY" train_sft.py --preset "$PRESET" --init "$RUN/sft" --data "$RUN/solutions.jsonl" \
                    --num_steps "$CONTROL_STEPS" --seed "$SEED" --run_dir "$RUN/control"
stage grpo      "$PY" train_grpo.py --preset "$PRESET" --init "$RUN/sft" --seed "$SEED" --run_dir "$RUN/grpo"
stage "evaluate base" "$PY" evaluate.py --preset "$PRESET" --checkpoint "$RUN/base" --num_samples 0 --out "$RUN/eval-base.json"
for model in sft control grpo; do
    stage "evaluate $model" "$PY" evaluate.py --preset "$PRESET" --checkpoint "$RUN/$model" --out "$RUN/eval-$model.json"
done
for model in sft grpo; do
    stage "figure 7 $model" "$PY" evaluate.py --preset "$PRESET" --checkpoint "$RUN/$model" --num_samples 64 \
                    --num_problems "$FIGURE7_PROBLEMS" --out "$RUN/figure7-$model.json"
done
stage report    "$PY" -m nanomath.measure.report --run_dir "$RUN"
