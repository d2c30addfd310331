# depth_node on Jetson Orin with JetPack 7.2 (Jetson Linux 39.2): TensorRT 10.16, PyTorch for CUDA 13, ROS 2 Jazzy.
#
# Nobody has built or run this file on a Jetson yet: it is put together from what its parts' owners and users report.
#
#   Build, on the board, in the top folder of this repository:
#     docker build -f config/containers/jetson_orin.Dockerfile -t depthlm:orin .
#
#   Look first; what it calls FAIL has to be mended before anything else:
#     docker run --rm --runtime nvidia --gpus all --network host --ipc host \
#       -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro depthlm:orin depthlm doctor
#
#   Run. EXPORT is a folder of `depthlm export MODEL EXPORT --target onnx --camera CALIBRATION.yaml`, made where the
#   checkpoint fits into memory. The first start builds the TensorRT plan into the volume, later ones find it there:
#     docker run --rm --runtime nvidia --gpus all --network host --ipc host \
#       -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro -v "$PWD/EXPORT":/export:ro -v depthlm-cache:/cache \
#       depthlm:orin depth_node --ros-args --params-file /opt/depthlm/share/depthlm_ros/config/jetson_orin.yaml \
#       -r image:=/camera/image_raw
#
# Docker on Jetson wants both --runtime nvidia and --gpus all. --ipc host shares /dev/shm, through which images come
# from nodes outside; they must run as the same user: --build-arg USER_ID="$(id -u)". Where the GPU's device files are
# closed to that user, add --group-add video --group-add "$(getent group render | cut -d: -f3)".
#
# The base: later images of this line (26.07 has 11.1) hold TensorRT 11, which JetPack supports from 11.4.1 on only;
# those with -igpu ask for a library that JetPack 7.2 no longer has. With this image TensorRT's depth engines came out
# right on Orin (ika-rwth-aachen/ros2-depth-anything-v3-trt #16; JetPack 6.2).
FROM nvcr.io/nvidia/tensorrt:26.03-py3

ARG DEBIAN_FRONTEND=noninteractive
# The user that nodes outside run as.
ARG USER_ID=1000
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# ROS 2 Jazzy from its own packages; the key must be the one that ROS has always signed with. Versions are apt's: Jazzy
# gets corrections only.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl gnupg python3-venv \
    && curl -fsSL https://raw.githubusercontent.com/ros/rosdistro/master/ros.key -o /tmp/ros.key \
    && gpg --show-keys --with-colons /tmp/ros.key | grep -q '^fpr:*C1CF6E31E6BADE8868B172B4F42ED6FBAB17C654:$' \
    && gpg --dearmor --output /usr/share/keyrings/ros.gpg /tmp/ros.key \
    && echo "deb [signed-by=/usr/share/keyrings/ros.gpg] http://packages.ros.org/ros2/ubuntu noble main" \
        > /etc/apt/sources.list.d/ros2.list \
    && apt-get update \
    && apt-get install -y --no-install-recommends ros-jazzy-ros-base \
    && rm -rf /var/lib/apt/lists/* /tmp/ros.key

# NVIDIA's images pin packages for every pip by this variable; ours live in an environment of their own.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PATH=/opt/depthlm/bin:$PATH
RUN python3 -m venv --system-site-packages /opt/depthlm

# PyTorch's own wheels for CUDA 13: their code for 8.0 computes on Orin (8.7), with a warning at start, on JetPack 7.2
# (reports: LibreYOLO on Orin Nano, nvidia-holoscan/holohub #1687 on AGX Orin). Wheels for servers with CUDA 13 import
# too and then fail at the first computation. --no-deps, since the CUDA toolkit that they name has no aarch64 wheel; the
# base image holds it, but for the four libraries, of which any version for CUDA 13 will do.
# hadolint ignore=DL3013
RUN pip install --no-deps --index-url https://download.pytorch.org/whl/cu130 \
        --extra-index-url https://pypi.org/simple torch==2.13.0 \
        nvidia-cudnn-cu13 nvidia-nccl-cu13 nvidia-cusparselt-cu13 nvidia-nvshmem-cu13 \
    && pip install filelock typing_extensions sympy networkx jinja2 fsspec

WORKDIR /src
COPY setup.py setup.cfg pyproject.toml package.xml README.md LICENSE ./
COPY resource resource
COPY depthlm_ros depthlm_ros
COPY training training
COPY launch launch
COPY config config
COPY models models
# torch is there already, and pip would try to replace it.
RUN pip install "setuptools>=70.1,<80" \
    && pip install --no-deps --no-build-isolation . \
    && python3 -c "from importlib.metadata import requires; print(*(each for each in requires('depthlm_ros') if \
        'extra' not in each and not each.startswith('torch')), sep=chr(10))" > /tmp/requirements.txt \
    && pip install --requirement /tmp/requirements.txt \
    && install -m 755 config/containers/entrypoint.sh /usr/local/bin/depthlm-entrypoint

# A user of one's own: an image of the base may already have one with this number.
RUN if getent passwd "$USER_ID" > /dev/null; then userdel --remove "$(getent passwd "$USER_ID" | cut -d: -f1)"; fi \
    && useradd --create-home --uid "$USER_ID" --groups video depthlm \
    && install -d -o depthlm /cache
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface ROS_LOG_DIR=/cache/ros_log ROS_DISTRO=jazzy
VOLUME /cache
WORKDIR /home/depthlm
USER $USER_ID

ENTRYPOINT ["depthlm-entrypoint"]
CMD ["depth_node", "--ros-args", "--params-file", "/opt/depthlm/share/depthlm_ros/config/jetson_orin.yaml"]
