// A few rows of activations times panels of packed weights: the arithmetic of decoding, bound by how fast weights
// stream from memory. Integer formats are summed as integers group by group (VNNI), each group's sum then enters a
// float32 sum; bf16 and fp8 are summed in float32 from bfloat16 products. Other levels than AVX-512:
// `products.h`. The order of every sum is fixed: it depends neither on the number of rows nor on who computes them.
// Included inside each level's namespace.
#pragma once

// So far ahead a line is asked for: streams start anew on each page, and prefetchers with them. Into the second cache, as
// the nearest can wait for fewer lines at a time than memory could send.
constexpr int64_t AHEAD = 4096;

#if defined(__AVX512BF16__)

constexpr int FEW = 8;  // rows at once: their sums fill half of the registers

inline __m512i line(const uint8_t* from) {
    _mm_prefetch(reinterpret_cast<const char*>(from) + AHEAD, _MM_HINT_T1);
    return _mm512_loadu_si512(from);
}

inline __m512i spread(const void* four) {
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    return _mm512_set1_epi32(word);
}

// The next vectors of unsigned codes, 4 columns each, from one line.
template <Format F>
inline int unsigned_codes(const uint8_t* from, __m512i* codes) {
    const __m512i bytes = line(from);
    if constexpr (F == Format::INT8) {
        codes[0] = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
        return 1;
    } else {
        const __m512i low = _mm512_set1_epi8(15);
        codes[0] = _mm512_and_si512(bytes, low);
        codes[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
        if constexpr (F == Format::FP4) {
            // Twice the value, plus 12.
            const __m512i values = _mm512_broadcast_i32x4(
                _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
            codes[0] = _mm512_shuffle_epi8(values, codes[0]);
            codes[1] = _mm512_shuffle_epi8(values, codes[1]);
        }
        return 2;
    }
}

template <Format F, int N>
inline void whole_products(const Matrix<F>& matrix, const Panel& panel, const uint8_t* const* rows, F16* result) {
    constexpr int64_t GROUP = layout<F>.group, LINES = GROUP * layout<F>.bits / 32, EACH = 8 / layout<F>.bits;
    const int64_t sides_at = matrix.groups * GROUP;
    const uint8_t* codes = panel.codes;
    // Behind a panel's codes lie its scales, so that much of the next panel's codes is passed over by requests for what
    // lies AHEAD: it is asked for here, a part with each group.
    const uint8_t* passed = codes + matrix.codes_bytes + AHEAD;
    const int64_t part = (matrix.panel_bytes - matrix.codes_bytes) / matrix.groups;
    F16 total[N] = {};
    for (int64_t g = 0; g < matrix.groups; ++g, passed += part) {
        _mm_prefetch(reinterpret_cast<const char*>(passed), _MM_HINT_T1);
        __m512i dot[N];
        for (int n = 0; n < N; ++n) dot[n] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int64_t i = 0; i < LINES; ++i, codes += 64) {
            __m512i four[2];
            unsigned_codes<F>(codes, four);
            for (int64_t j = 0; j < EACH; ++j)
                for (int n = 0; n < N; ++n)
                    dot[n] = _mm512_dpbusd_epi32(dot[n], four[j], spread(rows[n] + g * GROUP + (i * EACH + j) * 4));
        }
        // Scales lie behind the codes: those of the next panel are asked for while this one's codes stream.
        _mm_prefetch(reinterpret_cast<const char*>(panel.scales) + matrix.panel_bytes + g * 64, _MM_HINT_T0);
        const F16 scale = scales<F>(panel, g);
        F16 zero;
        if constexpr (F == Format::INT4) zero = zeros(panel, g);
        for (int n = 0; n < N; ++n) {
            const Side& side = reinterpret_cast<const Side*>(rows[n] + sides_at)[g];
            F16 sum = (F16)_mm512_cvtepi32_ps(dot[n]);
            if constexpr (F == Format::INT4)
                sum -= zero * side.fix;
            else
                sum += side.fix;
            total[n] += sum * (scale * side.scale);
        }
    }
    for (int n = 0; n < N; ++n) result[n] = total[n];
}

// Bfloat16 bits of FP8 codes, the high and the low byte by table. Below 2^-6 the numbers are subnormal in FP8 only.
struct Fp8Table {
    alignas(64) uint8_t high[128], low[128];

    constexpr Fp8Table() : high(), low() {
        for (int code = 0; code < 128; ++code) {
            int exponent = code >> 3, mantissa = code & 7;
            int bits = 0;
            if (code == 127) {
                bits = 0x7fc0;
            } else if (exponent > 0) {
                bits = (exponent + 120) << 7 | mantissa << 4;
            } else if (mantissa > 0) {
                exponent = 1;
                while (mantissa < 8) {
                    mantissa *= 2;
                    --exponent;
                }
                bits = (exponent + 120) << 7 | (mantissa & 7) << 4;
            }
            high[code] = static_cast<uint8_t>(bits >> 8);
            low[code] = static_cast<uint8_t>(bits & 255);
        }
    }
};
constexpr Fp8Table FP8_TABLE;

// The next four columns of 16 rows, two to a vector; how many bytes they took.
template <Format F>
inline int pairs(const uint8_t* from, __m512i* two) {
    two[0] = line(from);
    if constexpr (F == Format::BF16) {
        two[1] = line(from + 64);
        return 128;
    } else {
        const __m512i bytes = two[0];
        const auto looked_up = [&](const uint8_t* table) {
            return _mm512_permutex2var_epi8(_mm512_load_si512(table), bytes, _mm512_load_si512(table + 64));
        };
        const __m512i low = looked_up(FP8_TABLE.low);
        // Of three inputs a, b, c: a | (b & c).
        const __m512i high = _mm512_ternarylogic_epi32(looked_up(FP8_TABLE.high), bytes, _mm512_set1_epi8(-128), 0xf8);
        const __mmask64 odd = 0xaaaaaaaaaaaaaaaa;
        two[0] = _mm512_mask_blend_epi8(odd, low, _mm512_slli_epi16(high, 8));
        two[1] = _mm512_mask_blend_epi8(odd, _mm512_srli_epi16(low, 8), high);
        return 64;
    }
}

template <Format F, int N>
inline void real_products(const Matrix<F>& matrix, const Panel& panel, const uint8_t* const* rows, F16* result) {
    constexpr int64_t GROUP = layout<F>.group;
    const uint8_t* codes = panel.codes;
    // Two sums take turns, for one alone would wait for itself.
    __m512 even[N], odd[N];
    F16 total[N] = {};
    for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm512_setzero_ps();
    for (int64_t g = 0; g < matrix.groups; ++g) {
        const int64_t end = (g + 1) * GROUP * 2;
        for (int64_t at = g * GROUP * 2; at < end; at += 8) {
            __m512i two[2];
            codes += pairs<F>(codes, two);
            for (int n = 0; n < N; ++n) {
                even[n] = _mm512_dpbf16_ps(even[n], (__m512bh)two[0], (__m512bh)spread(rows[n] + at));
                odd[n] = _mm512_dpbf16_ps(odd[n], (__m512bh)two[1], (__m512bh)spread(rows[n] + at + 4));
            }
        }
        if constexpr (F == Format::FP8) {
            const F16 scale = scales<F>(panel, g);
            for (int n = 0; n < N; ++n) {
                total[n] += ((F16)even[n] + (F16)odd[n]) * scale;
                even[n] = odd[n] = _mm512_setzero_ps();
            }
        }
    }
    for (int n = 0; n < N; ++n) result[n] = F == Format::FP8 ? total[n] : (F16)even[n] + (F16)odd[n];
}

// `N` rows by one panel: result[n] holds the products with its 16 rows. Compiled once for each N.
template <Format F, int N>
__attribute__((noinline)) void products(const Matrix<F>& matrix, const Panel& panel, const uint8_t* const* rows,
                                        F16* result) {
    if constexpr (whole<F>)
        whole_products<F, N>(matrix, panel, rows, result);
    else
        real_products<F, N>(matrix, panel, rows, result);
}

#else

#include "products.h"

#endif

// Up to FEW rows.
template <Format F>
inline void products(const Matrix<F>& matrix, int64_t index, const uint8_t* const* rows, int64_t count, F16* result) {
    const Panel panel = matrix.panel(index);
    while (count > 0) {
        int done = 1;
        if (FEW >= 8 && count >= 8) {
            products<F, FEW>(matrix, panel, rows, result);
            done = 8;
        } else if (count >= 4) {
            products<F, 4>(matrix, panel, rows, result);
            done = 4;
        } else if (count >= 2) {
            products<F, 2>(matrix, panel, rows, result);
            done = 2;
        } else {
            products<F, 1>(matrix, panel, rows, result);
        }
        rows += done, result += done, count -= done;
    }
}
