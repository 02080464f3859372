"""A pytest plugin that puts `lodestream.safetensors` in the place of `safetensors`, before any test is imported."""

import sys

import lodestream.safetensors
import lodestream.safetensors.numpy
import lodestream.safetensors.torch

sys.modules["safetensors"] = sys.modules["safetensors._safetensors_rust"] = lodestream.safetensors
sys.modules["safetensors.numpy"] = lodestream.safetensors.numpy
sys.modules["safetensors.torch"] = lodestream.safetensors.torch
