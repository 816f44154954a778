// Products of bfloat16 pairs, on the matrix unit (AMX) and on vectors: the inner loops of attention on shared rows and
// of choosing entries. Rows lie as they are; queries are packed as [dim / 2, 16 heads, 2]. Included inside each level's
// namespace; empty where there is no bfloat16 arithmetic.
#pragma once

#if defined(__AVX512BF16__)
#define DAEDAL_TILES __attribute__((target("amx-tile,amx-bf16")))

inline __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~__mmask32{0} : count <= 0 ? __mmask32{0} : (__mmask32{1} << count) - 1;
}

// 16 x 16 numbers of 32 bits.
inline void transpose_words(__m512i* rows) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            t[8 * j + i] = _mm512_shuffle_i32x4(rows[8 * j + i], rows[8 * j + i + 4], 0x88);
            t[8 * j + i + 4] = _mm512_shuffle_i32x4(rows[8 * j + i], rows[8 * j + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Numbers of two rows in turn: columns 0 to 15, and 16 to 31.
inline __m512i pair_low(__m512i a, __m512i b) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(a));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(b));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

inline __m512i pair_high(__m512i a, __m512i b) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(a, 1));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(b, 1));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

inline __m512bh as_pairs(const void* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline __m512bh one_pair(const bf16* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// Queries of up to 16 heads as [dim / 2, 16 heads, 2], dim rounded up to 32 and zero there.
inline void pack_pairs(const char* q, int64_t head_stride, int64_t heads, int64_t dim, float* packed) {
    for (int64_t k = 0; k < dim; k += 32) {
        __m512i lanes[16];
        const __mmask32 mask = first_lanes(dim - k);
        for (int h = 0; h < 16; ++h) {
            const auto* row = reinterpret_cast<const bf16*>(q + h * head_stride) + k;
            lanes[h] = h < heads ? _mm512_maskz_loadu_epi16(mask, row) : _mm512_setzero_si512();
        }
        transpose_words(lanes);
        for (int pair = 0; pair < 16; ++pair) _mm512_storeu_si512(packed + (k / 2 + pair) * 16, lanes[pair]);
    }
}

// Eight tiles of 16 rows of 64 bytes.
DAEDAL_TILES inline void use_tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
    }
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(config);
}

// scores[tile][key][head] for 16 rows and tiles of 16 heads. `packed`: the tiles' queries one after the other.
DAEDAL_TILES inline void multiply_tiles(
    const bf16* rows, int64_t stride, const float* packed, int64_t dim, int64_t tiles, float* scores, int64_t step) {
    // The compiler does not know that tile loads read memory.
    __asm__ volatile("" ::: "memory");
    const int64_t one = dim * 8;  // numbers of 32 bits of one tile's queries
    int64_t tile = 0;
    for (; tile + 4 <= tiles; tile += 4) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const float* from = packed + tile * one;
        for (int64_t k = 0; k < dim; k += 32, from += 256) {
            _tile_loadd(4, rows + k, stride * 2);
            _tile_loadd(5, from, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, from + one, 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, from + 2 * one, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, from + 3 * one, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, scores + tile * step, 64);
        _tile_stored(1, scores + (tile + 1) * step, 64);
        _tile_stored(2, scores + (tile + 2) * step, 64);
        _tile_stored(3, scores + (tile + 3) * step, 64);
    }
    for (; tile < tiles; ++tile) {
        _tile_zero(0);
        const float* from = packed + tile * one;
        for (int64_t k = 0; k < dim; k += 32, from += 256) {
            _tile_loadd(4, rows + k, stride * 2);
            _tile_loadd(5, from, 64);
            _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, scores + tile * step, 64);
    }
    __asm__ volatile("" ::: "memory");
}

inline void multiply_pairs(
    const bf16* rows, int64_t stride, const float* packed, int64_t dim, int64_t tiles, float* scores, int64_t step) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* from = packed + tile * dim * 8;
        __m512 sums[16];
        for (int key = 0; key < 16; ++key) sums[key] = _mm512_setzero_ps();
        for (int64_t k = 0; k < dim; k += 2, from += 16) {
            const __m512bh q = as_pairs(from);
            for (int key = 0; key < 16; ++key)
                sums[key] = _mm512_dpbf16_ps(sums[key], q, one_pair(rows + key * stride + k));
        }
        for (int key = 0; key < 16; ++key) _mm512_storeu_ps(scores + tile * step + key * 16, sums[key]);
    }
}

// result[16 heads][32 columns] += weights . values. weights: [slots / 32, 16 heads, 32]; values: 16 columns' pairs of
// slots, the next 16 columns `stride` numbers on.
DAEDAL_TILES inline void add_tiles(
    const bf16* weights, const bf16* values, int64_t stride, int64_t slots, float (*result)[32]) {
    __asm__ volatile("" ::: "memory");
    _tile_loadd(0, result[0], 128);
    _tile_loadd(1, result[0] + 16, 128);
    for (int64_t slot = 0; slot < slots; slot += 32) {
        _tile_loadd(4, weights + slot * 16, 64);
        _tile_loadd(5, values + slot * 16, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, values + stride + slot * 16, 64);
        _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, result[0], 128);
    _tile_stored(1, result[0] + 16, 128);
    __asm__ volatile("" ::: "memory");
}

inline void add_pairs(
    const bf16* weights, const bf16* values, int64_t stride, int64_t slots, float (*result)[32]) {
    for (int first = 0; first < 16; first += 8) {
        __m512 sums[8][2];
        for (int i = 0; i < 8; ++i)
            for (int part = 0; part < 2; ++part) sums[i][part] = _mm512_loadu_ps(result[first + i] + 16 * part);
        for (int64_t slot = 0; slot < slots; slot += 2) {
            const __m512bh low = as_pairs(values + slot * 16), high = as_pairs(values + stride + slot * 16);
            const bf16* pair = weights + slot / 32 * 512 + slot % 32;
            for (int i = 0; i < 8; ++i) {
                const __m512bh weight = one_pair(pair + (first + i) * 32);
                sums[i][0] = _mm512_dpbf16_ps(sums[i][0], low, weight);
                sums[i][1] = _mm512_dpbf16_ps(sums[i][1], high, weight);
            }
        }
        for (int i = 0; i < 8; ++i)
            for (int part = 0; part < 2; ++part) _mm512_storeu_ps(result[first + i] + 16 * part, sums[i][part]);
    }
}
#endif
