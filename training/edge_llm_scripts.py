"""The shell scripts of an Edge-LLM export: how the engines are built on the device, and how one file is answered.

The builders are C++ programs that are compiled on the device from NVIDIA/TensorRT-Edge-LLM; they are in no wheel.
"""

from __future__ import annotations

from pathlib import Path

from depthlm_training.edge_llm_sizes import Sizes

BUILD, RUN = "build_on_device.sh", "run_on_device.sh"

_BUILD = r"""#!/usr/bin/env bash
# Builds TensorRT engines from the graphs in onnx/, on the device that will run them: a plan only fits the
# board, the TensorRT and the JetPack that made it.
#
#     ./build_on_device.sh [FOLDER]      FOLDER of the engines; engines/ beside this script without it
#
# Then let the node use them, which first compares their answers with reference/:
#
#     depthlm parity THIS_FOLDER THIS_FOLDER --engine edge_llm
#     ros2 launch depthlm_ros depthlm.launch.py model:=THIS_FOLDER engine:=edge_llm
#
# llm_build and visual_build come from a source build of NVIDIA/TensorRT-Edge-LLM v@VERSION@ on this device; have them
# on the PATH, or name them in LLM_BUILD and VISUAL_BUILD. Their plugin library is found above them, or named by
# EDGELLM_PLUGIN_PATH.
# The sizes below belong to the camera that this was exported for: images of @WIDTH@x@HEIGHT@ pixels, @TOKENS@ tokens.
# With builders' defaults larger images would be shrunk without a word, and depth with them.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
engines="${1:-$here/engines}"
llm_build="${LLM_BUILD:-llm_build}"
visual_build="${VISUAL_BUILD:-visual_build}"

for tool in "$llm_build" "$visual_build"; do
    command -v "$tool" > /dev/null || {
        echo "$0: no $tool; build the examples of TensorRT Edge-LLM v@VERSION@ and put them on the PATH, or set" \
             "LLM_BUILD and VISUAL_BUILD" >&2
        exit 1
    }
    # The printed help is the only thing that tells versions of these tools apart.
    help="$("$tool" --help 2>&1 || true)"
    wanted="--onnxDir --engineDir"
    if [ "$tool" = "$llm_build" ]; then
        wanted="$wanted --maxInputLen --maxKVCacheCapacity --maxBatchSize"
    else
        wanted="$wanted --minImageTokens --maxImageTokens --maxImageTokensPerImage"
    fi
    for flag in $wanted; do
        case "$help" in
            *"$flag"*) ;;
            *) echo "$0: $tool knows no $flag; it must be of TensorRT Edge-LLM v@VERSION@" >&2; exit 1 ;;
        esac
    done
done

@PLUGIN@
# Without room in the pool nothing that questions share would outlive a batch; older versions have no pool.
pool=()
case "$("$llm_build" --help 2>&1 || true)" in
    *--maxKVPoolPages*) pool=(--maxKVPoolPages @POOL@) ;;
esac

# Where it is built, kept beside the engines: plans of another board or TensorRT are refused.
board="$(tr -d '\0' < /proc/device-tree/model 2> /dev/null || true)"
l4t="$(sed -n 's/^# R\([0-9]*\) (release), REVISION: \([0-9.]*\).*/\1.\2/p' /etc/nv_tegra_release 2> /dev/null || true)"
tensorrt="$(dpkg-query --showformat='${Version}\n' --show 'libnvinfer1*' 2> /dev/null \
    | sed -n 's/^\([0-9][0-9.]*\).*/\1/p' | head -n 1 || true)"
echo "board ${board:-unknown}; Jetson Linux ${l4t:-none}; TensorRT ${tensorrt:-unknown}; Edge-LLM graphs of v@VERSION@"
case "$l4t" in
    3[0-7].*) echo "$0: warning: Edge-LLM @VERSION@ supports Orin from JetPack 7.2 on" >&2 ;;
esac

mkdir -p "$engines"
"$llm_build" --onnxDir "$here/onnx/llm" --engineDir "$engines" \
    --maxInputLen @MAX_INPUT_LEN@ --maxKVCacheCapacity @MAX_KV@ --maxBatchSize @BATCH@ ${pool[@]+"${pool[@]}"}
# Writes visual/ into the folder.
"$visual_build" --onnxDir "$here/onnx/visual" --engineDir "$engines" \
    --minImageTokens @MIN_IMAGE@ --maxImageTokens @MAX_IMAGE@ --maxImageTokensPerImage @PER_IMAGE@

for file in "$engines/llm.engine" "$engines/visual/visual.engine"; do
    [ -s "$file" ] || { echo "$0: $file wasn't written; the lines above say why" >&2; exit 1; }
done
printf '{"board": "%s", "l4t": "%s", "tensorrt": "%s"}\n' "$board" "$l4t" "$tensorrt" > "$engines/built_on.json"
echo "built in $engines"
"""

# A source build has its programs in build/examples/ and the plugin in build/.
_PLUGIN = r"""
# The tools look for their plugin in build/ of the working directory, unless it is named.
if [ -z "${EDGELLM_PLUGIN_PATH:-}" ]; then
    folder="$(dirname "$(readlink -f "$(command -v "@TOOL@")")")"
    for _ in 1 2 3 4; do
        if [ -f "$folder/libNvInfer_edgellm_plugin.so" ]; then
            export EDGELLM_PLUGIN_PATH="$folder/libNvInfer_edgellm_plugin.so"
            break
        fi
        folder="$(dirname "$folder")"
    done
fi
[ -f "${EDGELLM_PLUGIN_PATH:-}" ] || {
    echo "$0: no libNvInfer_edgellm_plugin.so above @TOOL@; name it in EDGELLM_PLUGIN_PATH" >&2
    exit 1
}
"""

_RUN = r"""#!/usr/bin/env bash
# Answers one file of requests with the engines of build_on_device.sh:
#
#     ./run_on_device.sh INPUT.json OUTPUT.json [FOLDER of the engines]
#
# The node does this by itself for engine:=edge_llm. llm_inference loads the model anew each time; for a camera's images
# serve the checkpoint (tensorrt-edgellm-serve CHECKPOINT --host 127.0.0.1) and use engine:=openai, or have the Python
# runtime of the wheel tensorrt-edgellm in the node's environment.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[ $# -ge 2 ] || { sed -n 's/^# \{0,1\}//; 2,8p' "$0" >&2; exit 2; }
engines="${3:-$here/engines}"
llm_inference="${LLM_INFERENCE:-llm_inference}"
command -v "$llm_inference" > /dev/null || {
    echo "$0: no $llm_inference; build the examples of TensorRT Edge-LLM v@VERSION@, or set LLM_INFERENCE" >&2
    exit 1
}
[ -s "$engines/llm.engine" ] || { echo "$0: no engines in $engines; run ./build_on_device.sh first" >&2; exit 1; }
@PLUGIN@
flags=()
case "$("$llm_inference" --help 2>&1 || true)" in
    *--enableContextReuse*) flags+=(--enableContextReuse) ;;
esac
exec "$llm_inference" --engineDir "$engines" --multimodalEngineDir "$engines" --inputFile "$1" --outputFile "$2" \
    ${flags[@]+"${flags[@]}"}
"""


def write_scripts(out: Path, sizes: Sizes, version: str) -> None:
    """Writes `build_on_device.sh` and `run_on_device.sh`.

    Args:
        out: folder of the export, with `onnx/` in it.
        sizes: that the engines are built for.
        version: of Edge-LLM that wrote the graphs.
    """
    said = {
        "VERSION": version,
        "WIDTH": sizes.width,
        "HEIGHT": sizes.height,
        "TOKENS": sizes.image_tokens,
        "MAX_INPUT_LEN": sizes.max_input_len,
        "MAX_KV": sizes.max_kv_cache_capacity,
        "BATCH": sizes.max_batch_size,
        "MIN_IMAGE": sizes.min_image_tokens,
        "MAX_IMAGE": sizes.max_image_tokens,
        "POOL": sizes.max_kv_pool_pages,
        "PER_IMAGE": sizes.max_image_tokens_per_image,
    }
    for name, text, tool in ((BUILD, _BUILD, "$llm_build"), (RUN, _RUN, "$llm_inference")):
        text = text.replace("@PLUGIN@\n", _PLUGIN.lstrip().replace("@TOOL@", tool))
        for word, value in said.items():
            text = text.replace(f"@{word}@", str(value))
        path = out / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
