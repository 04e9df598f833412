// The host face of primitives.cuh.
#pragma once
#include "tensor_cores.h"
