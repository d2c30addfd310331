#!/usr/bin/env bash
# Start of the Jetson containers: sources ROS and, if an export is mounted, makes its engine ready in the cache.
#
# A TensorRT plan fits the board, the Jetson Linux and the TensorRT that made it and nothing else, so none is in the
# image: the first start builds it (minutes), later ones find it. Another export, another JetPack: another folder.
#
#   /export   what `depthlm export` made, read-only
#   /cache    kept between starts; /cache/engine is the folder to give the node as its model
#
# DEPTHLM_PRECISION: of the plan (fp32, fp16, bf16); without it, the export's own.
set -eo pipefail

export_folder="${DEPTHLM_EXPORT:-/export}"
cache="${DEPTHLM_CACHE:-/cache}"

# ROS' own script reads variables that aren't set, hence no `set -u`.
# shellcheck disable=SC1090
source "${ROS_SETUP:-/opt/ros/${ROS_DISTRO:-jazzy}/setup.bash}"

if [ -f "$export_folder/engine.json" ]; then
    if ! read -r name target < <(python3 - "$export_folder/engine.json" <<'PYTHON'
import hashlib
import json
import pathlib
import sys

from depthlm_ros.machine import this_machine

text = pathlib.Path(sys.argv[1]).read_bytes()
here = json.dumps(this_machine().as_dict(), sort_keys=True).encode()
# The digest first: whatever stands in the file, the folder's name is ours.
print(hashlib.sha256(text + here).hexdigest()[:16], json.loads(text)["target"])
PYTHON
    ); then
        echo "entrypoint: $export_folder/engine.json can't be read; export the model again" >&2
        exit 1
    fi
    case "$target" in
        onnx | edge-llm | tensorrt-llm) ;;
        *)
            echo "entrypoint: $export_folder/engine.json has target '$target'; known: onnx, edge-llm, tensorrt-llm." \
                "Export the model again" >&2
            exit 1
            ;;
    esac
    case "${DEPTHLM_PRECISION:-fp32}" in
        fp32 | fp16 | bf16) ;;
        *)
            echo "entrypoint: DEPTHLM_PRECISION is '$DEPTHLM_PRECISION'; known: fp32, fp16, bf16" >&2
            exit 1
            ;;
    esac
    folder="$cache/engines/$name${DEPTHLM_PRECISION:+-$DEPTHLM_PRECISION}"
    if [ ! -f "$folder/engine.json" ]; then
        rm -rf "$folder.part"
        mkdir -p "$cache/engines"
        cp -r "$export_folder" "$folder.part"
        chmod -R u+w "$folder.part"
        if [ "$target" = onnx ]; then
            echo "entrypoint: building the TensorRT plan for this machine; this takes minutes, once" >&2
            depthlm build "$folder.part" ${DEPTHLM_PRECISION:+--precision "$DEPTHLM_PRECISION"}
        fi
        # In one step, so that an interrupted build is never taken for an engine.
        mv "$folder.part" "$folder"
    fi
    ln -sfn "$folder" "$cache/engine"
fi

exec "$@"
