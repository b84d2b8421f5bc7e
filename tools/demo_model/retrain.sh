#!/bin/sh
# Trains, exports, checks, packs and measures the demo model; run from the root of the repository.
set -eu
run=build/demo
full=build/demo-hf
packed=build/demo-packed
python -m tools.demo_model.train --out "$run" --minutes "${MINUTES:-120}" --processes "${PROCESSES:-2}"
python -m tools.demo_model.export --run "$run" --out "$full"
python -m tools.demo_model.check --model "$full"
rm -rf "$packed"
puna quantize "$full" "$packed" --quant int8
cp "$packed"/* python/puna/demo/
python -m tools.demo_model.figures --reference "$full" --model "$packed"
python -m tools.demo_model.evaluate --model "$packed"
