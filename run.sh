#!/usr/bin/env bash
# ./run.sh          sets up .venv and runs the demo: small tasks and models, made on the spot
# ./run.sh test     sets up .venv and runs all tests; further arguments go to pytest
# ./run.sh paper    sets up .venv and runs Table 1 of the paper on GPUS (default 4) GPUs
# ./run.sh study    sets up .venv and runs methods and divergences on the demo, JOBS (default 2) at a time, with
#                   the training seeds SEEDS (default 10 20 30 40 50); hours
# Start it again to go on: a run that has its eval.json is not repeated, any other goes on from its last save.
set -euo pipefail
cd "$(dirname "$0")"

requirements=(requirements.txt experiments/requirements.txt)
if ! cat "${requirements[@]}" | cmp -s - .venv/installed.txt; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${requirements[@]/#/-r}"
    cat "${requirements[@]}" > .venv/installed.txt
fi
python=.venv/bin/python

once() {  # once FOLDER COMMAND...: nothing if the folder has its eval.json
    local folder=$1
    shift
    [ -f "$folder/eval.json" ] || "$@"
}

# the demo's flags: short answers, a small student and teacher that start from nothing
demo_flags() {  # demo_flags OUT
    echo --out "$1" --data "$1/data" --student "$1/data/student" --teacher "$1/data/teacher" \
        --tests "seen=$1/data/seen.jsonl" "longer=$1/data/longer.jsonl" --dev-rows 100 --micro-batch 16 \
        --epochs 4 --lr 2e-3 --lr-projectors 2e-3 --teacher-epochs 8 --teacher-lr 2e-3 \
        --dev-samplings 1 --eval-seeds 10 20 30 --max-new-tokens 40 --no-repeat-ngram 0
}

job=${1:-demo}
shift || true
case $job in
    demo)
        export OMP_NUM_THREADS=1  # for models as small as these, a second thread only waits
        out=runs/demo
        flags="$(demo_flags $out) --teacher-epochs 4"
        [ -d $out/data/teacher-same ] || $python experiments/demo.py $out/data
        {   # on a second core, beside the next run; its output is in a file
            once $out/untrained $python dskd_ga.py $flags --eval-only $out/data/student --name untrained
            once $out/sft-10 $python dskd_ga.py $flags --method sft
        } > $out/beside.log 2>&1 &
        once $out/cma-skl-10 $python dskd_ga.py $flags  # fine-tunes the teacher first
        wait $!
        once $out/teacher $python dskd_ga.py $flags --eval-only $out/teacher-tuned/best --name teacher \
            >> $out/beside.log 2>&1 &
        once $out/cma-ga-skl-10 $python dskd_ga.py $flags --ga
        wait $!
        $python experiments/report.py --baseline sft $out/{untrained,sft-10,cma-skl-10,cma-ga-skl-10,teacher}
        $python experiments/chunks.py --figure $out/alignment $out/{cma-skl-10,cma-ga-skl-10} ;;
    test) exec $python -m pytest -q "$@" ;;
    paper)
        train() { .venv/bin/torchrun --standalone --nproc_per_node="${GPUS:-4}" "$@"; }
        gpt2="--teacher MiniLLM/teacher-gpt2-1.5B --teacher-ready"  # the same-tokenizer teacher, ready as it is
        once runs/untrained train dskd_ga.py --eval-only openai-community/gpt2 --name untrained
        once runs/teacher-gpt2-xl train dskd_ga.py --eval-only MiniLLM/teacher-gpt2-1.5B --name teacher-gpt2-xl
        once runs/dskd-skl-10 train experiments/baselines.py --method dskd $gpt2
        once runs/sft-10 train dskd_ga.py --method sft
        once runs/mined-10 train experiments/baselines.py --method mined
        once runs/uld-10 train experiments/baselines.py --method uld
        once runs/cma-srkl-10 train dskd_ga.py --div srkl
        once runs/clp-skl-10 train experiments/chunks.py --method clp
        once runs/cla-skl-10 train experiments/chunks.py --method cla
        once runs/cma-ga-skl-10 train dskd_ga.py --div skl --ga
        once runs/cma-ct-kl-10 train experiments/matching.py --match ct --div kl
        once runs/cma-kl-10 train dskd_ga.py --div kl
        once runs/cma-ga-kl-10 train dskd_ga.py --div kl --ga
        once runs/teacher train dskd_ga.py --eval-only runs/Qwen1.5-1.8B-tuned/best --name teacher
        $python experiments/report.py --baseline cma-kl runs/{untrained,teacher-gpt2-xl,dskd-skl-10,teacher,sft-10} \
            runs/{mined,uld,cma-srkl,clp-skl,cla-skl,cma-ga-skl,cma-ct-kl,cma-kl,cma-ga-kl}-10 ;;
    study)
        export OMP_NUM_THREADS=1 out=runs/study python
        flags=$(demo_flags $out)
        export flags
        export same="--teacher $out/data/teacher-same"
        [ -d $out/data/teacher-same ] || $python experiments/demo.py $out/data
        once $out/untrained $python dskd_ga.py $flags --eval-only $out/data/student --name untrained
        # the first run of each teacher fine-tunes it for all others
        once $out/kd-skl-10 $python experiments/baselines.py $flags $same --method kd
        once $out/cma-skl-10 $python dskd_ga.py $flags
        once $out/teacher-same $python dskd_ga.py $flags --eval-only $out/teacher-same-tuned/best --name teacher-same
        once $out/teacher $python dskd_ga.py $flags --eval-only $out/teacher-tuned/best --name teacher
        {
            for seed in ${SEEDS:-10 20 30 40 50}; do
                echo "sft-$seed dskd_ga.py --method sft --seed $seed"
                for method in kd dskd; do
                    echo "$method-skl-$seed experiments/baselines.py --method $method --seed $seed $same"
                done
                echo "uld-$seed experiments/baselines.py --method uld --seed $seed"
                echo "mined-$seed experiments/baselines.py --method mined --seed $seed"
                echo "clp-skl-$seed experiments/chunks.py --method clp --seed $seed"
                echo "cla-skl-$seed experiments/chunks.py --method cla --seed $seed"
                echo "cma-ct-skl-$seed experiments/matching.py --match ct --seed $seed"
                for div in skl kl srkl rkl jsd akl; do
                    echo "cma-$div-$seed dskd_ga.py --div $div --seed $seed"
                    echo "cma-nq-$div-$seed dskd_ga.py --div $div --seed $seed --normalise-queries"
                    echo "cma-ga-$div-$seed dskd_ga.py --div $div --seed $seed --ga"
                    echo "cma-ga-nq-$div-$seed dskd_ga.py --div $div --seed $seed --ga --normalise-queries"
                    echo "cma-released-$div-$seed experiments/matching.py --match released --div $div --seed $seed"
                done
            done
        } | xargs -P "${JOBS:-2}" -I LINE bash -c 'set -- LINE; run=$1 script=$2; shift 2
            [ -f "$out/$run/eval.json" ] || "$python" "$script" $flags "$@"'
        $python experiments/chunks.py $out/{cma,clp,cla}-*-*[0-9]
        $python experiments/report.py --baseline cma-skl $(dirname $out/*/eval.json) ;;
    *) echo "run.sh: found $job, expected demo, test, paper or study" >&2; exit 2 ;;
esac
