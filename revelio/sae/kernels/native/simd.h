// Eight numbers at a time, on every processor that the kernel is compiled for.
#pragma once
#if defined(__aarch64__)
#include "neon.h"
#else
#include <immintrin.h>
#endif
