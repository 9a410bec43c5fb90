// Torch's headers that nearly every file of this folder includes, directly or not, and that take longer to read than
// the file itself. setup.py has GCC read them once; nothing depends on that.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
