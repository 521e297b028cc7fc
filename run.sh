#!/usr/bin/env bash
# ./run.sh          sets up .venv and runs the demo: small tasks and models, made on the spot
# ./run.sh test     sets up .venv and runs all tests; further arguments go to pytest
# ./run.sh paper    sets up .venv and runs Table 1 of the paper on GPUS (default 4) GPUs
# ./run.sh study    sets up .venv and runs the evidence of experiments/README.md, JOBS (default 2) at a time, with
#                   the training seeds SEEDS (default 10 20 ... 200); on two cores about half a day
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
# glibc keeps the memory that a step has freed: where the kernel is slow to give it again, runs are much faster
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000

once() {  # once FOLDER COMMAND...: nothing if the folder has its eval.json
    local folder=$1
    shift
    [ -f "$folder/eval.json" ] || "$@"
}

shared() {  # shared OUT: what all runs on small models have in common
    echo --out $1 --data $1/data --tests seen=$1/data/seen.jsonl longer=$1/data/longer.jsonl --dev-rows 100 \
        --micro-batch 16 --lr 2e-3 --lr-projectors 2e-3 --dev-samplings 1 --eval-seeds 10 20 30 \
        --max-new-tokens 40 --no-repeat-ngram 0
}

flags() {  # flags OUT EPOCHS: for models that were trained before, on the 400 rows in OUT/data
    echo $(shared $1) --student $1/student-10/best --teacher $1/teacher-10/best --teacher-ready \
        --batch-size 16 --epochs $2
}

from_nothing() {  # from_nothing OUT: for untrained models, on the 4,000 rows in OUT/data
    echo $(shared $1) --student $1/data/student --teacher $1/data/teacher --teacher-epochs 8 --teacher-lr 2e-3 \
        --epochs 4
}

before() {  # before OUT NAME EPOCHS ROWS: trains OUT/data/NAME on the rows in OUT/data/ROWS
    once $1/$2-10 $python dskd_ga.py $(shared $1) --method sft --epochs $3 --name $2 \
        --student $1/data/$2 --data $1/data/$4
}

greedy() {  # greedy OUT RUN: evaluates the run's student once more, without sampling
    local name=${2%-*}-greedy-${2##*-}
    once $1/$name $python dskd_ga.py $(shared $1) --eval-only $1/$2/best --eval-temperature 0 --name $name
}

job=${1:-demo}
shift || true
case $job in
    demo)
        export OMP_NUM_THREADS=1  # for models as small as these, a second thread only waits
        out=runs/demo
        [ -d $out/data/teacher-same ] || $python experiments/demo.py $out/data
        {   # on a second core; its output is in a file
            before $out student 4 before-student
            once $out/sft-10 $python dskd_ga.py $(flags $out 20) --method sft
        } > $out/beside.log 2>&1 &
        before $out teacher 2 before-teacher
        wait $! || tail $out/beside.log
        once $out/cma-skl-10 $python dskd_ga.py $(flags $out 20) >> $out/beside.log 2>&1 &
        once $out/cma-ga-skl-10 $python dskd_ga.py $(flags $out 20) --ga
        wait $! || tail $out/beside.log
        $python experiments/chunks.py --figure $out/alignment.png $out/{cma-skl-10,cma-ga-skl-10}
        $python experiments/report.py $out/{student,sft,cma-skl,cma-ga-skl,teacher}-10 --baseline sft ;;
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
        $python experiments/report.py runs/{untrained,teacher-gpt2-xl,dskd-skl-10,teacher,sft-10} \
            runs/{mined,uld,cma-srkl,clp-skl,cla-skl,cma-ga-skl,cma-ct-kl,cma-kl,cma-ga-kl}-10 \
            experiments/results/paper.json --baseline cma-kl ;;
    study)
        export OMP_NUM_THREADS=1 python
        for rows in new few many; do
            [ -d runs/$rows/data/teacher-same ] || $python experiments/demo.py runs/$rows/data --rows $rows
        done
        for rows in few many; do
            before runs/$rows student 8 before-student
            before runs/$rows teacher 4 before-teacher
            before runs/$rows teacher-same 4 before-teacher
        done
        train() {  # train SETTING NAME-SEED SCRIPT FLAG...
            local out=runs/$1 run=$2 script=$3 settings
            shift 3
            settings=$(flags $out 80)
            [ $out != runs/new ] || settings=$(from_nothing $out)
            once $out/$run $python $script $settings --seed ${run##*-} "$@"
            greedy $out $run
        }
        export -f train shared flags from_nothing once greedy
        {
            for seed in ${SEEDS:-$(seq 10 10 200)}; do
                for rows in new few many; do  # the primary comparison and the secondary ones
                    echo "$rows sft-$seed dskd_ga.py --method sft"
                    echo "$rows cma-skl-$seed dskd_ga.py"
                    echo "$rows cma-ga-skl-$seed dskd_ga.py --ga"
                done
                for rows in new many; do  # controls: 100 steps of 500 and of 2,000
                    share=0.2
                    [ $rows = new ] || share=0.05
                    echo "$rows cma-placebo-skl-$seed experiments/matching.py --match placebo"
                    echo "$rows cma-early-skl-$seed experiments/matching.py --match early --until $share"
                done
            done
            for seed in 10 20 30 40 50; do  # exploratory
                for steps in 10:0.02 30:0.06 300:0.6; do
                    echo "new cma-early${steps%:*}-skl-$seed experiments/matching.py --match early" \
                        "--until ${steps#*:} --name cma-early${steps%:*}-skl"
                done
                for rows in few many; do
                    echo "$rows kd-skl-$seed experiments/baselines.py --method kd --teacher runs/$rows/teacher-same-10/best"
                    echo "$rows uld-$seed experiments/baselines.py --method uld"
                    echo "$rows mined-$seed experiments/baselines.py --method mined"
                    echo "$rows clp-skl-$seed experiments/chunks.py --method clp"
                    echo "$rows cla-skl-$seed experiments/chunks.py --method cla"
                    echo "$rows cma-ct-skl-$seed experiments/matching.py --match ct"
                    echo "$rows cma-ga-nq-skl-$seed experiments/matching.py --match ga --normalise-queries"
                done
            done
        } | xargs -P "${JOBS:-2}" -I LINE bash -euc 'set -- LINE; train "$@"'
        once runs/new/teacher $python dskd_ga.py $(shared runs/new) --eval-only runs/new/teacher-tuned/best --name teacher
        shopt -s nullglob  # not every method is in every setting
        for rows in new few many; do
            $python experiments/chunks.py $(dirname runs/$rows/{sft,kd,uld,mined,cl,cma}*-*0/best)
            $python experiments/report.py $(dirname runs/$rows/*/eval.json) --keep runs/$rows.json --baseline cma-skl sft
        done
        $python experiments/pictures.py runs/{new,few,many}.json ;;
    *) echo "run.sh: found $job, expected demo, test, paper or study" >&2; exit 2 ;;
esac
