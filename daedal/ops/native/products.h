// The products of `matvec.h` without AVX-512: a group of columns at a time, and of the panel's 16 rows as many as one
// register has lanes, so that all sums stay in registers. Whole numbers are multiplied as bytes where there are
// instructions for it (AVX2, NEON with dot products), else as floats; bf16 and fp8 are floats. Included inside each
// level's namespace.
#pragma once

#include "registers.h"

constexpr int FEW = 4;  // rows at once
constexpr int PARTS = PANEL / LANES;

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

inline Words words_of(const uint8_t* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return words;
}

inline Integers bytes_of(const uint8_t* from) {
#if defined(__AVX2__)
    return (Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Integers);
#endif
}

// As `scales` and `zeros`, for the rows of one part.
template <Format F>
inline Register scales_part(const Panel& panel, int64_t group, int part) {
    const int64_t at = group * PANEL + part * LANES;
    if constexpr (F == Format::FP8) {
        return Register{} + reinterpret_cast<const float*>(panel.scales)[group];
    } else if constexpr (F == Format::FP4) {
        const Integers bits = bytes_of(panel.scales + at) << 23;
        return (Register)(bits > 0x400000 ? bits : Integers{} + 0x400000);
    } else {
        return take(reinterpret_cast<const bf16*>(panel.scales) + at);
    }
}

inline Register zeros_part(const Panel& panel, int64_t group, int part) {
    return __builtin_convertvector(bytes_of(panel.zeros + group * PANEL + part * LANES), Register);
}

// Column `j` of those that lie in 32-bit words, as float32: without scale, and without zero point.
template <Format F>
inline Register column(Words words, int j) {
    if constexpr (F == Format::BF16) {
        return (Register)(j == 0 ? words << 16 : words & 0xffff0000u);
    } else if constexpr (F == Format::INT8) {
        return __builtin_convertvector((Integers)(words << (24 - 8 * j)) >> 24, Register);
    } else if constexpr (F == Format::FP8) {
        constexpr int at[] = {0, 16, 8, 24};
        const Words code = words >> at[j] & 127;
        const Register small = __builtin_convertvector((Integers)code, Register) * 0x1p-9f;
        const Words bits = code == 127 ? Words{} + 0x7fc00000u : (code << 20) + (120u << 23);
        const Words sign = (words >> at[j] & 128) << 24;
        return (Register)((code < 8 ? (Words)small : bits) | sign);
    } else {
        const Words code = words >> (j < 4 ? 8 * j : 8 * j - 28) & 15;
        if constexpr (F == Format::INT4) {
            return __builtin_convertvector((Integers)code, Register);
        } else {
            // Exponent and mantissa of e2m1 are float32's after a shift; 1 alone is subnormal.
            const Words size = code & 7;
            const Words bits = size < 2 ? size * 0x3f000000u : (size << 22) + (126u << 23);
            return (Register)(bits | (code & 8) << 28);
        }
    }
}

// One group of N rows by one part of a panel, whose first line is `codes`: in float32. Columns take turns in two sums,
// for one alone would wait for itself.
template <Format F, int N>
inline void float_sums(const uint8_t* codes, const float* const* x, Register* sums) {
    constexpr int EACH = 32 / layout<F>.bits;
    Register even[N] = {}, odd[N] = {};
    for (int k = 0; k < layout<F>.group; k += EACH, codes += 64) {
        const Words words = words_of(codes);
#pragma GCC unroll 8
        for (int j = 0; j < EACH; j += 2) {
            const Register first = column<F>(words, j), second = column<F>(words, j + 1);
            for (int n = 0; n < N; ++n) {
                even[n] += first * x[n][k + j];
                odd[n] += second * x[n][k + j + 1];
            }
        }
    }
    for (int n = 0; n < N; ++n) sums[n] = even[n] + odd[n];
}

// As `float_sums`, where there are products of bytes.
template <Format F, int N>
inline void byte_sums(const uint8_t* codes, const int8_t* const* x, Register* sums);

#if defined(__AVX2__)

// Fp8 through float16, whose exponent is one bit wider: what comes out is 2^-8 of the number. Two columns of a row stay
// side by side, and are added at the end.
template <int N>
inline void fp8_sums(const uint8_t* codes, const float* const* x, Register* sums) {
    const __m256i size = _mm256_set1_epi16(0x3f80), sign = _mm256_set1_epi16(static_cast<short>(0x8000));
    __m256 low[N], high[N];
    for (int n = 0; n < N; ++n) low[n] = high[n] = _mm256_setzero_ps();
    for (int k = 0; k < layout<Format::FP8>.group; k += 4, codes += 64) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
#pragma GCC unroll 2
        for (int j = 0; j < 4; j += 2) {
            __m256i half = _mm256_and_si256(j == 0 ? _mm256_slli_epi16(bytes, 7) : _mm256_srli_epi16(bytes, 1), size);
            half = _mm256_or_si256(half, _mm256_cmpeq_epi16(half, size));  // all ones is no number, as it should be
            half = _mm256_or_si256(half, _mm256_and_si256(j == 0 ? _mm256_slli_epi16(bytes, 8) : bytes, sign));
            const __m256 first = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            const __m256 second = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
            for (int n = 0; n < N; ++n) {
                double pair;
                std::memcpy(&pair, x[n] + k + j, sizeof pair);
                const __m256 two = _mm256_castpd_ps(_mm256_set1_pd(pair));
                low[n] = _mm256_fmadd_ps(first, two, low[n]);
                high[n] = _mm256_fmadd_ps(second, two, high[n]);
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        const __m256d rows = _mm256_castps_pd(_mm256_hadd_ps(low[n], high[n]));
        sums[n] = (Register)_mm256_permute4x64_pd(rows, 0xd8) * 256.0f;
    }
}

inline __m256i spread(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    return _mm256_set1_epi32(word);
}

// Bytes are multiplied unsigned by signed, and two products added in 16 bits. Of int8 the weight's sign goes over to the
// activation: 2 * 128 * 127 fits. Of the others so many sums of two fit that they are widened seldom.
template <Format F, int N>
inline void byte_sums(const uint8_t* codes, const int8_t* const* x, Register* sums) {
    const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15);
    // Twice the value, plus 12.
    const __m256i values = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    constexpr int GROUP = layout<F>.group, RUN = F == Format::INT8 ? 4 : F == Format::FP4 ? 16 : 32;
    __m256i dot[N];
    for (int n = 0; n < N; ++n) dot[n] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int start = 0; start < GROUP; start += RUN) {
        __m256i run[N];
        for (int n = 0; n < N; ++n) run[n] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int k = start; k < start + RUN; codes += 64) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
                if constexpr (F == Format::INT8) {
                const __m256i size = _mm256_abs_epi8(bytes);
                for (int n = 0; n < N; ++n) run[n] = _mm256_maddubs_epi16(size, _mm256_sign_epi8(spread(x[n] + k), bytes));
                k += 4;
            } else {
                __m256i low = _mm256_and_si256(bytes, nibble);
                __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
                if constexpr (F == Format::FP4) {
                    low = _mm256_shuffle_epi8(values, low);
                    high = _mm256_shuffle_epi8(values, high);
                }
                for (int n = 0; n < N; ++n) {
                    run[n] = _mm256_add_epi16(run[n], _mm256_maddubs_epi16(low, spread(x[n] + k)));
                    run[n] = _mm256_add_epi16(run[n], _mm256_maddubs_epi16(high, spread(x[n] + k + 4)));
                }
                k += 8;
            }
        }
        for (int n = 0; n < N; ++n) dot[n] = _mm256_add_epi32(dot[n], _mm256_madd_epi16(run[n], ones));
    }
    for (int n = 0; n < N; ++n) sums[n] = (Register)_mm256_cvtepi32_ps(dot[n]);
}

#elif defined(__ARM_FEATURE_DOTPROD)

// Four products of bytes at once, both signed.
template <Format F, int N>
inline void byte_sums(const uint8_t* codes, const int8_t* const* x, Register* sums) {
    const int8_t doubled[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const int8x16_t values = vld1q_s8(doubled);
    int32x4_t dot[N];
    for (int n = 0; n < N; ++n) dot[n] = vdupq_n_s32(0);
    const auto add = [&](int8x16_t four, int k) {
        for (int n = 0; n < N; ++n) {
            int32_t word;
            std::memcpy(&word, x[n] + k, sizeof word);
            dot[n] = vdotq_s32(dot[n], four, vreinterpretq_s8_s32(vdupq_n_s32(word)));
        }
    };
#pragma GCC unroll 4
    for (int k = 0; k < layout<F>.group; codes += 64) {
        const uint8x16_t bytes = vld1q_u8(codes);
        if constexpr (F == Format::INT8) {
            add(vreinterpretq_s8_u8(bytes), k);
            k += 4;
        } else {
            const uint8x16_t low = vandq_u8(bytes, vdupq_n_u8(15)), high = vshrq_n_u8(bytes, 4);
            if constexpr (F == Format::FP4) {
                add(vqtbl1q_s8(values, low), k);
                add(vqtbl1q_s8(values, high), k + 4);
            } else {
                add(vreinterpretq_s8_u8(low), k);
                add(vreinterpretq_s8_u8(high), k + 4);
            }
            k += 8;
        }
    }
    for (int n = 0; n < N; ++n) sums[n] = (Register)vcvtq_f32_s32(dot[n]);
}

#endif

template <Format F, int N>
inline void group_sums(const uint8_t* codes, const Activation<F>* const* x, Register* sums) {
    if constexpr (std::is_same_v<Activation<F>, int8_t>) {
        byte_sums<F, N>(codes, x, sums);
#if defined(__AVX2__)
    } else if constexpr (F == Format::FP8) {
        fp8_sums<N>(codes, x, sums);
#endif
    } else {
        float_sums<F, N>(codes, x, sums);
    }
}

template <Format F, int N>
__attribute__((noinline)) void products(const Matrix<F>& matrix, const Panel& panel, const uint8_t* const* rows,
                                        F16* result) {
    constexpr int64_t GROUP = layout<F>.group, GROUP_BYTES = GROUP * PANEL * layout<F>.bits / 8;
    const int64_t sides_at = matrix.groups * GROUP * sizeof(Activation<F>);
    Register total[PARTS][N] = {};
    for (int64_t g = 0; g < matrix.groups; ++g) {
        const Activation<F>* x[N];
        for (int n = 0; n < N; ++n) x[n] = reinterpret_cast<const Activation<F>*>(rows[n]) + g * GROUP;
        // Scales lie behind the codes: those of the next panel are asked for while this one's codes stream.
        if constexpr (whole<F>) __builtin_prefetch(panel.scales + matrix.panel_bytes + g * 64);
        for (int part = 0; part < PARTS; ++part) {
            constexpr int64_t SHARE = GROUP_BYTES / PARTS;
            for (int64_t at = 0; at < SHARE; at += 64)
                __builtin_prefetch(panel.codes + g * GROUP_BYTES + part * SHARE + at + AHEAD);
            Register sums[N];
            group_sums<F, N>(panel.codes + g * GROUP_BYTES + part * LANES * 4, x, sums);
            if constexpr (F == Format::BF16) {
                for (int n = 0; n < N; ++n) total[part][n] += sums[n];
                continue;
            }
            const Register scale = scales_part<F>(panel, g, part);
            Register zero{};
            if constexpr (F == Format::INT4) zero = zeros_part(panel, g, part);
            for (int n = 0; n < N; ++n) {
                if constexpr (whole<F>) {
                    const Side& side = reinterpret_cast<const Side*>(rows[n] + sides_at)[g];
                    if constexpr (F == Format::INT4)
                        sums[n] -= zero * side.fix;
                    else
                        sums[n] += side.fix;
                    total[part][n] += sums[n] * (scale * side.scale);
                } else {
                    total[part][n] += sums[n] * scale;
                }
            }
        }
    }
    for (int n = 0; n < N; ++n)
        for (int part = 0; part < PARTS; ++part)
            put(reinterpret_cast<float*>(result + n) + part * LANES, total[part][n]);
}
