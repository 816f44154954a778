// All kernels for one instruction set: this file is compiled once for each level, with the level's flags and its name in
// NATIVE_LEVEL, and exports one table.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>

#include "team.h"

#define DAEDAL_JOIN_(a, b) a##b
#define DAEDAL_JOIN(a, b) DAEDAL_JOIN_(a, b)

namespace daedal {
namespace NATIVE_LEVEL {

#include "lanes.h"
#include "rows.h"
#include "packed_rows.h"
#include "attention.h"
#include "elementwise.h"
#include "draw.h"
#include "weights.h"
#include "gradients.h"
#include "matvec.h"
#include "matmul.h"
#include "linear.h"
#include "experts.h"
#include "hyper.h"
#include "sparse.h"
#include "choose.h"
#include "compress.h"

static const Entry TABLE[] = {
    DAEDAL_PACKED_ROWS_KERNELS
    DAEDAL_ATTENTION_KERNELS
    DAEDAL_ROWS_KERNELS DAEDAL_LINEAR_KERNELS DAEDAL_EXPERTS_KERNELS DAEDAL_ELEMENTWISE_KERNELS
    DAEDAL_DRAW_KERNELS
    DAEDAL_GRADIENTS_KERNELS DAEDAL_HYPER_KERNELS DAEDAL_SPARSE_KERNELS DAEDAL_CHOOSE_KERNELS DAEDAL_COMPRESS_KERNELS
};

}  // namespace NATIVE_LEVEL

const Entry* DAEDAL_JOIN(table_, NATIVE_LEVEL)(int* count) {
    *count = static_cast<int>(sizeof NATIVE_LEVEL::TABLE / sizeof NATIVE_LEVEL::TABLE[0]);
    return NATIVE_LEVEL::TABLE;
}

}  // namespace daedal
