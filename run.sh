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
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000  # glibc keeps memory that a step has freed for the next

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

# the flags of `few` and `many`: models that were trained before learn from 400 rows
trained_flags() {  # trained_flags ROWS
    local out=runs/$1
    echo --out $out --data $out/data --student $out/student-10/best --teacher $out/teacher-10/best --teacher-ready \
        --tests seen=$out/data/seen.jsonl longer=$out/data/longer.jsonl --dev-rows 100 --batch-size 16 \
        --micro-batch 16 --epochs 80 --lr 2e-3 --lr-projectors 2e-3 --dev-samplings 1 --eval-seeds 10 20 30 \
        --max-new-tokens 40 --no-repeat-ngram 0
}

prepare() {  # prepare ROWS: the rows, and the models that learn from others before
    local out=runs/$1 flags
    flags="$(trained_flags $1) --method sft --batch-size 32"
    [ -d $out/data/teacher-same ] || $python experiments/demo.py $out/data --rows $1
    once $out/student-10 $python dskd_ga.py $flags --name student --epochs 8 \
        --student $out/data/student --data $out/data/before-student
    once $out/teacher-10 $python dskd_ga.py $flags --name teacher --epochs 4 \
        --student $out/data/teacher --data $out/data/before-teacher
    once $out/same-10 $python dskd_ga.py $flags --name same --epochs 4 \
        --student $out/data/teacher-same --data $out/data/before-teacher
}

train_and_evaluate() {  # train_and_evaluate ROWS NAME-SEED SCRIPT FLAG...: and once more without sampling
    local out=runs/$1 run=$2 script=$3 flags
    flags=$(trained_flags $1)
    shift 3
    once $out/$run $python $script $flags --seed ${run##*-} "$@"
    once $out/${run%-*}-greedy-${run##*-} $python dskd_ga.py $flags --eval-only $out/$run/best \
        --name ${run%-*}-greedy-${run##*-} --eval-temperature 0
}
export -f once trained_flags train_and_evaluate

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
        export OMP_NUM_THREADS=1 python
        for rows in few many; do prepare $rows & done
        wait
        {
            for seed in ${SEEDS:-10 20 30 40 50}; do
                for rows in few many; do
                    echo "$rows sft-$seed dskd_ga.py --method sft"
                    echo "$rows kd-skl-$seed experiments/baselines.py --method kd --teacher runs/$rows/same-10/best"
                    echo "$rows uld-$seed experiments/baselines.py --method uld"
                    echo "$rows mined-$seed experiments/baselines.py --method mined"
                    echo "$rows clp-skl-$seed experiments/chunks.py --method clp"
                    echo "$rows cla-skl-$seed experiments/chunks.py --method cla"
                    echo "$rows cma-skl-$seed experiments/matching.py --match none"
                    for match in ga ct unsaturated mmd; do
                        echo "$rows cma-$match-skl-$seed experiments/matching.py --match $match"
                    done
                    echo "$rows cma-mmd10-skl-$seed experiments/matching.py --match mmd --kq-weight 10 --name cma-mmd10-skl"
                    echo "$rows cma-ga-nq-skl-$seed experiments/matching.py --match ga --normalise-queries"
                done
                for terms in ce_t2s kd_t2s kd_s2t "kd_t2s kd_s2t" "ce_t2s kd_t2s kd_s2t"; do
                    name=cma-no_${terms// /-no_}-skl
                    echo "few $name-$seed experiments/matching.py --match none --without $terms"
                done
            done
        } | xargs -P "${JOBS:-2}" -I LINE bash -c 'set -- LINE; train_and_evaluate "$@"'
        for rows in few many; do
            $python experiments/report.py --baseline cma-skl sft $(dirname runs/$rows/*/eval.json)
        done ;;
    *) echo "run.sh: found $job, expected demo, test, paper or study" >&2; exit 2 ;;
esac
