#!/usr/bin/env bash
# ./run.sh          sets up .venv and runs the demo
# ./run.sh test     sets up .venv and runs the tests; further arguments go to pytest
# ./run.sh paper    sets up .venv and runs Table 1 of the paper on GPUS (default 4) GPUs
# ./run.sh study    sets up .venv and runs every method and divergence on the demo, JOBS (default 2) at a time,
#                   with the training seeds SEEDS (default 10 20 30 40 50); hours
# Start it again to go on: what is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")"

if ! cmp -s requirements.txt .venv/installed.txt; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi
python=.venv/bin/python

job=${1:-demo}
shift || true
case $job in
    demo)
        row() { $python dskd_ga.py --demo "$@"; }
        row --eval-only runs/demo/data/student --name untrained
        row --method sft
        row
        row --ga
        row --eval-only runs/demo/teacher-tuned/best --name teacher
        row --report runs/demo/{untrained,sft-10,cma-skl-10,cma-ga-skl-10,teacher} --baseline sft --align 4 ;;
    test) exec $python -m pytest -q test_dskd_ga.py "$@" ;;
    paper)
        row() { .venv/bin/torchrun --standalone --nproc_per_node="${GPUS:-4}" dskd_ga.py "$@"; }
        row --eval-only openai-community/gpt2 --name untrained
        row --method dskd --teacher openai-community/gpt2-xl
        row --eval-only runs/gpt2-xl-tuned/best --name teacher-gpt2-xl
        row --method sft
        row --method mined
        row --method uld
        row --div srkl
        row --method clp
        row --method cla
        row --div skl --ga
        row --ct --div kl
        row --div kl
        row --div kl --ga
        row --eval-only runs/Qwen1.5-1.8B-tuned/best --name teacher
        $python dskd_ga.py --baseline cma-kl --report runs/{untrained,teacher-gpt2-xl,dskd-skl-10,teacher,sft-10,mined-10,uld-10} \
            runs/{cma-srkl-10,clp-skl-10,cla-skl-10,cma-ga-skl-10,cma-ct-kl-10,cma-kl-10,cma-ga-kl-10} ;;
    study)
        out=runs/study
        row() { $python dskd_ga.py --demo --out $out "$@"; }
        row --eval-only $out/data/student --name untrained
        row --method kd  # the first run of each pair also fine-tunes its teacher
        row
        row --eval-only $out/teacher-same-tuned/best --name teacher-same
        row --eval-only $out/teacher-tuned/best --name teacher
        {
            for seed in ${SEEDS:-10 20 30 40 50}; do
                echo "--method sft --seed $seed"
                for flags in "--method kd" "--method dskd"; do
                    echo "$flags --seed $seed --cache-teacher $out/hidden-same"
                done
                for flags in "--method uld" "--method mined" "--method clp" "--method cla" "--ct"; do
                    echo "$flags --seed $seed --cache-teacher $out/hidden"
                done
            done
            for div in skl kl srkl rkl jsd akl; do
                for seed in ${SEEDS:-10 20 30 40 50}; do
                    for flags in "" "--ga" "--normalise-queries" "--ga --normalise-queries" "--ga --released-kq"; do
                        echo "--div $div $flags --seed $seed --cache-teacher $out/hidden"
                    done
                done
            done
        } | OMP_NUM_THREADS=1 xargs -P "${JOBS:-2}" -L 1 $python dskd_ga.py --demo --out $out
        $python dskd_ga.py --report $(dirname $out/*/eval.json) --baseline cma-skl ;;
    *) echo "run.sh: found $job, expected demo, test, paper or study" >&2; exit 2 ;;
esac
