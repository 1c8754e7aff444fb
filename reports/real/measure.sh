#!/bin/sh
# What make real-figures measures on SmolLM2-135M: ten to fifteen hours on two cores, as --dry-run estimates. It goes on where it was interrupted.
# A step is named by its run folder under reports/real/runs, or haystacks; give names to do some of them only. DRY=1 estimates.
# BOOKS and WIKITEXT are local copies of books and of WikiText-2 (--data); without them, the hub's are used.
set -eu
cd "$(dirname "$0")/../.."
KVBENCH=${KVBENCH:-.venv/bin/kvbench}
MODEL="--model smollm2-135m --no-baselines"
DTYPE=bfloat16
RUNS=reports/real/runs
METHODS="--method snapkv --method tova --method h2o --method expected-attention --method chunkkv --method pyramidkv
  --method adakv --method streaming-llm --method knorm --method keydiff --method lagkv --method random"
WANTED=" ${*:-} "

step() { # NAME ARGUMENTS: one run folder; packed records are unpacked when it goes on, and packed again
  name=$1; shift
  case "$WANTED" in "  "|*" $name "*) ;; *) return 0 ;; esac
  echo "== $name"
  # shellcheck disable=SC2086
  $KVBENCH sweep $MODEL --dtype $DTYPE "$@" --out "$RUNS/$name" ${DRY:+--dry-run}
  [ -n "${DRY:-}" ] || find "$RUNS/$name/cells" -name 'records*.jsonl' -exec gzip -9nf {} +
}

tasks() { for task in "$@"; do printf ' --task %s' "$task"; done; }

# The full cache on every task first. Lists are written line by line: their answers end at the end token.
LINE="--set stop=line --set question=hidden"
EVERY="$(tasks ruler-niah-single-1 ruler-niah-single-2 ruler-niah-single-3 ruler-niah-multikey-1 ruler-niah-multikey-2 \
  ruler-niah-multikey-3 needles passkey kv-retrieval babi instructions arithmetic docqa)"
LISTS="$(tasks ruler-niah-multivalue ruler-niah-multiquery ruler-vt ruler-cwe ruler-fwe)"
# shellcheck disable=SC2086
{
step full-1024 --method full $EVERY $LINE --set length=1024 --limit 20
step full-lists-1024 --method full $LISTS --set question=hidden --set length=1024 --limit 20

# What it solves at 1024 tokens (0.5 or more): twelve methods, question hidden and known.
SOLVED="$(tasks ruler-niah-single-1 ruler-niah-single-2 ruler-niah-single-3 ruler-niah-multikey-1 needles passkey)"
MANY="$(tasks ruler-niah-multivalue ruler-niah-multiquery)"
RATIOS="--ratio 0.5 --ratio 0.7 --ratio 0.9"
for length in 1024 2048; do
  step "answers-$length" $METHODS $RATIOS $SOLVED --set stop=line --set "length=$length" --limit 20
done

# Text: a compressed prefix of 960 tokens, and the next 320; passages of 2048 tokens, compressed while they are read.
FOUR="--ratio 0.3 --ratio 0.5 --ratio 0.7 --ratio 0.9"
SIX="--method snapkv --method tova --method h2o --method streaming-llm --method knorm --method sinks"
step books-prefix $METHODS $FOUR --task books ${BOOKS:+--data "$BOOKS"} --protocol prefix --limit 24
step wikitext2-prefix $METHODS $FOUR --task wikitext2 ${WIKITEXT:+--data "$WIKITEXT"} --protocol prefix --limit 24
step books-stream $SIX $FOUR --task books ${BOOKS:+--data "$BOOKS"} --protocol stream --set tokens=2048 --limit 6
step wikitext2-stream $SIX $FOUR --task wikitext2 ${WIKITEXT:+--data "$WIKITEXT"} --protocol stream --set tokens=2048 --limit 6

# In float32, which is faster where the processor has no arithmetic in bfloat16: samples of 4096 tokens, of what the full
# cache solves there too (twenty of the plain needles, one of them in books and without a template as well), lists, and text that is written
# after a compressed prefix.
DTYPE=float32
step full-4096 --method full $(tasks ruler-niah-single-1 ruler-niah-single-2) $LINE --set length=4096 --limit 20
RUNS=reports/real/haystacks  # the same task in other words, which no table holds beside it
step full-books-4096 --method full --task ruler-niah-single-2 ${BOOKS:+--data "$BOOKS"} $LINE --set length=4096 --limit 20
step full-plain-4096 --method full --task ruler-niah-single-2 --set template=none $LINE --set length=4096 --limit 20
RUNS=reports/real/runs
step full-others-4096 --method full $(tasks ruler-niah-single-3 ruler-niah-multikey-1 needles passkey) $LINE \
  --set length=4096 --limit 10
step answers-4096 $METHODS $RATIOS $(tasks ruler-niah-single-1 ruler-niah-single-2 needles) --set stop=line \
  --set length=4096 --limit 10
step answers-lists-1024 $METHODS $RATIOS $MANY --set length=1024 --limit 20
step written $METHODS --ratio 0.5 --ratio 0.9 --task minidocs-gen --limit 24
}
