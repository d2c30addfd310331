"""Installs the package: under `pip install .`, `pip install -e .` and `colcon build` alike.

Scripts land in `bin/` (on the PATH of a virtual environment and of a sourced colcon workspace). `ros2 run` and
launch's `Node(package=..., executable=...)` look in `lib/depthlm_ros/` instead, which neither pip nor setuptools
fills by itself, so the two executables in `resource/` go there as data files.
"""

import re
from glob import glob
from os.path import isfile
from pathlib import Path

from setuptools import find_packages, setup

NAME = "depthlm_ros"
# The published metric's parser, in the version whose verdicts the published figures were checked against.
COMPAT = ["math-verify[antlr4_13_2]==0.9.0"]
# torch.utils.tensorboard writes through the first; adapters are the second.
TRAIN = ["tensorboard>=2.17", "peft>=0.18"]
# Graphs are exported by the first two and run by the third, which on a robot is the one for its accelerator.
EXPORT = ["onnx>=1.18", "onnxscript>=0.6", "onnxruntime>=1.20"]
VERSION = re.search(r'^__version__ = "(.+)"$', Path(NAME, "__init__.py").read_text(encoding="utf-8"), re.M).group(1)

# Named one by one: a checkpoint that somebody keeps under models/ must not end up in a wheel.
CONFIGS = ("config", "config/train", "config/containers")
SHARED_FOLDERS = ("launch", *CONFIGS, "models", "models/demo", "models/sample_drive")


def shared(folder):
    """Returns the data_files entry that installs a folder's files under share/depthlm_ros/."""
    return f"share/{NAME}/{folder}", sorted(path for path in glob(f"{folder}/*") if isfile(path))


setup(
    name=NAME,
    version=VERSION,
    description="Metric 3D from any RGB camera with a vision-language model, as a ROS 2 package",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"])
    + ["depthlm_training"]
    + [f"depthlm_training.{package}" for package in find_packages("training")],
    package_dir={"depthlm_training": "training"},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"lib/{NAME}", ["resource/depth_node", "resource/depthlm"]),
        *[entry for entry in map(shared, SHARED_FOLDERS) if entry[1]],
    ],
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "depthlm = depthlm_ros.cli:main",
            "depth_node = depthlm_ros.node:main",
        ]
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.14",
        "safetensors>=0.5",
        "jinja2>=3.1",
        "numpy>=2",
        "opencv-python-headless>=4.10",
        "pillow>=10.3",
        "pyyaml>=6",
        "rosbags>=0.11",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        # The same library under its two names: the first needs Python 3.11, which ROS 2 Humble doesn't have.
        "httpx2>=2; python_version >= '3.11'",
        "httpx>=0.27; python_version < '3.11'",
    ],
    extras_require={
        # ROS 2 Kilted for machines that have none of their own; robots have theirs from apt.
        "ros": [
            "ros-rclpy[fastrtps]==9.1.2",
            "ros-sensor-msgs==5.5.1",
            "ros-visualization-msgs==5.5.1",
            "ros-diagnostic-msgs==5.5.1",
            "ros-std-srvs==5.5.1",
        ],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-benchmark>=5",
            "hypothesis>=6.100",
            "setuptools>=70.1",
            "colcon-ros",
            "colcon-package-information",
            *COMPAT,
            *TRAIN,
            *EXPORT,
            # A server of others to be asked.
            "transformers[serving]",
        ],
        "export": EXPORT,
        "train": TRAIN,
        "compat": COMPAT,
        "lint": ["ruff>=0.6"],
    },
)
