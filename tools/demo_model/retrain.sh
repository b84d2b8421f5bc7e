#!/bin/sh
# Trains, exports, checks and measures the demo model; run from the root of the repository.
set -eu
run=build/demo
out=python/puna/demo
python -m tools.demo_model.train --out "$run" --minutes "${MINUTES:-60}"
python -m tools.demo_model.export --run "$run" --out "$out"
python -m tools.demo_model.check --run "$run" --model "$out"
python -m tools.demo_model.evaluate --model "$out"
