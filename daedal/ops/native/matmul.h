// Many rows of activations times packed weights on the matrix unit (AMX): panels are widened to bfloat16 once, scales
// folded in, and then meet all rows, 32 of them and two panels at a time. Rows are bfloat16. Without the matrix unit
// there is nothing here, and many rows go the way of few. Included inside the level's namespace.
#pragma once

#if defined(__AVX512BF16__)

#define DAEDAL_AMX __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t STEP = 32;   // columns of one tile
constexpr int64_t BLOCK = 32;  // rows at a time: two tiles

// From so many rows on, widening costs less than it saves.
template <Format F>
constexpr int64_t MANY = F == Format::BF16   ? 3
                         : F == Format::FP8  ? 6
                         : F == Format::INT4 ? 12
                         : F == Format::FP4  ? 16
                                             : 20;

// Rows of so many bytes stay in a core's cache while panels pass, two at a time. Larger ones pass themselves, and meet
// as many panels as WIDENED bytes hold.
constexpr int64_t RESIDENT = 1 << 20, WIDENED = 768 << 10;

template <Format F>
constexpr int64_t widened_columns(int64_t columns) { return padded(columns, layout<F>.group); }

// Panels at a time, in pairs.
template <Format F>
inline int64_t panels_at_once(int64_t rows, int64_t columns) {
    const int64_t row_bytes = widened_columns<F>(columns) * sizeof(bf16);
    return rows * row_bytes <= RESIDENT ? 2 : std::max<int64_t>(2, WIDENED / (row_bytes * PANEL) & ~1);
}

// Each number twice, side by side: rows 0 to 7, and 8 to 15.
inline __m512i twice(__m512i values, bool high) {
    const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_epi32(high ? _mm512_add_epi32(first, _mm512_set1_epi32(8)) : first, values);
}

inline __m512i twice(F16 values, bool high) { return twice((__m512i)values, high); }

inline void store_pair(bf16* to, __m512 low, __m512 high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Lines of 16 rows, from columns that lie in the bits of 32-bit words.
template <Format F>
__attribute__((noinline)) void widen_group(const Panel& panel, int64_t group, bf16* to) {
    constexpr int64_t LINES = layout<F>.group * layout<F>.bits / 32;
    const uint8_t* codes = panel.codes + group * LINES * 64;
    const F16 scale = scales<F>(panel, group);
    const __m512 scale_low = (__m512)twice(scale, false), scale_high = (__m512)twice(scale, true);
    if constexpr (F == Format::INT8) {
        for (int64_t i = 0; i < LINES; ++i) {
            const __m512i bytes = line(codes + i * 64);
            const __m512i low = twice(bytes, false), high = twice(bytes, true);
            for (int pair = 0; pair < 2; ++pair, to += 32) {
                const __m512i up = _mm512_set1_epi64(pair == 0 ? 16ll << 32 | 24 : 8);
                const auto number = [&](__m512i words, __m512 by) {
                    const __m512i code = _mm512_srai_epi32(_mm512_sllv_epi32(words, up), 24);
                    return _mm512_mul_ps(_mm512_cvtepi32_ps(code), by);
                };
                store_pair(to, number(low, scale_low), number(high, scale_high));
            }
        }
    } else {
        __m512 values, lack_low{}, lack_high{};
        if constexpr (F == Format::INT4) {
            values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const F16 lack = scale * zeros(panel, group) * (-1.0f / 16.0f);
            lack_low = (__m512)twice(lack, false), lack_high = (__m512)twice(lack, true);
        } else {
            values = _mm512_setr_ps(0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6);
        }
        for (int64_t i = 0; i < LINES; ++i) {
            const __m512i bytes = line(codes + i * 64);
            const __m512i low = twice(bytes, false), high = twice(bytes, true);
            for (int pair = 0; pair < 4; ++pair, to += 32) {
                const int64_t down = pair * 16 % 32 + pair / 2 * 4;
                const __m512i shifts = _mm512_set1_epi64((down + 8) << 32 | down);
                const auto number = [&](__m512i words, __m512 by, __m512 lack) {
                    return _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), values), by, lack);
                };
                store_pair(to, number(low, scale_low, lack_low), number(high, scale_high, lack_high));
            }
        }
    }
}

template <>
__attribute__((noinline)) inline void widen_group<Format::FP8>(const Panel& panel, int64_t group, bf16* to) {
    constexpr int64_t LINES = 32;
    const __m512 scale = (__m512)scales<Format::FP8>(panel, group);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t i = 0; i < LINES; ++i) {
        __m512i two[2];
        pairs<Format::FP8>(panel.codes + (group * LINES + i) * 64, two);
        for (int j = 0; j < 2; ++j, to += 32) {
            const __m512 even = _mm512_mul_ps((__m512)_mm512_slli_epi32(two[j], 16), scale);
            const __m512i upper = _mm512_and_si512(two[j], _mm512_set1_epi32(static_cast<int>(0xffff0000)));
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps((__m512)upper, scale), even);
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
        }
    }
}

// A panel as bfloat16 tiles, 32 columns each: where it lies for bf16, else written to `scratch`.
template <Format F>
inline const bf16* widened(const Panel& panel, int64_t columns, bf16* scratch) {
    if constexpr (F == Format::BF16) {
        return reinterpret_cast<const bf16*>(panel.codes);
    } else {
        constexpr int64_t GROUP = layout<F>.group;
        for (int64_t g = 0; g * GROUP < columns; ++g) widen_group<F>(panel, g, scratch + g * GROUP * PANEL);
        return scratch;
    }
}

// The matrix unit's registers, shaped for blocks of some number of rows: 0 to 3 sums, 4 and 5 rows, 6 and 7 weights.
class Tiles {
  public:
    DAEDAL_AMX ~Tiles() {
        if (rows_ != 0) _tile_release();
    }

    // c[row][0..15] and [16..31]: the products of up to 32 rows with two panels, over `steps` tiles of columns.
    DAEDAL_AMX void multiply(const bf16* x, int64_t stride, int64_t rows, const bf16* first, const bf16* second,
                             int64_t steps, float (*c)[2 * PANEL]) {
        if (rows != rows_) shape(rows);
        const bf16* lower = x + 16 * stride;
        stride *= sizeof(bf16);
        _tile_zero(0);
        _tile_zero(1);
        if (rows <= 16) {
            for (int64_t step = 0; step < steps; ++step) {
                _tile_loadd(4, x + step * STEP, stride);
                _tile_loadd(6, first + step * STEP * PANEL, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, second + step * STEP * PANEL, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
        } else {
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t step = 0; step < steps; ++step) {
                _tile_loadd(4, x + step * STEP, stride);
                _tile_loadd(6, first + step * STEP * PANEL, 64);
                _tile_loadd(7, second + step * STEP * PANEL, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, lower + step * STEP, stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(2, c[16], sizeof *c);
            _tile_stored(3, c[16] + PANEL, sizeof *c);
        }
        _tile_stored(0, c[0], sizeof *c);
        _tile_stored(1, c[0] + PANEL, sizeof *c);
    }

  private:
    int64_t rows_ = 0;

    DAEDAL_AMX void shape(int64_t rows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        const auto upper = static_cast<uint8_t>(std::min<int64_t>(rows, 16));
        const auto lower = static_cast<uint8_t>(std::max<int64_t>(rows - 16, 1));
        for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = 64;
        for (int tile : {0, 1, 4}) config.rows[tile] = upper;
        for (int tile : {2, 3, 5}) config.rows[tile] = lower;
        config.rows[6] = config.rows[7] = 16;
        _tile_loadconfig(&config);
        rows_ = rows;
    }
};

#endif
