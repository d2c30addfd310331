"""Metric 3D from any RGB camera with a vision-language model, as a ROS 2 package."""

__version__ = "0.1.0"
