// All kernels for one instruction set: this file is compiled once for each level, with the level's flags and its name in
// DAEDAL_LEVEL, and exports one table.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "team.h"

#define DAEDAL_JOIN_(a, b) a##b
#define DAEDAL_JOIN(a, b) DAEDAL_JOIN_(a, b)

namespace daedal {
namespace DAEDAL_LEVEL {

#include "lanes.h"
#include "rows.h"

static const Entry TABLE[] = {
    DAEDAL_ROWS_KERNELS
};

}  // namespace DAEDAL_LEVEL

const Entry* DAEDAL_JOIN(table_, DAEDAL_LEVEL)(int* count) {
    *count = static_cast<int>(sizeof DAEDAL_LEVEL::TABLE / sizeof DAEDAL_LEVEL::TABLE[0]);
    return DAEDAL_LEVEL::TABLE;
}

}  // namespace daedal
