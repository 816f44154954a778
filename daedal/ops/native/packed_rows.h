// Rows of a cache in eight bits: e4m3 codes in groups of 64 with a power of two each, and the last numbers in bfloat16
// (packed_rows.py is the truth of the byte order). Unpacked numbers are exact in bfloat16. Included inside each level's
// namespace.
#pragma once

constexpr int PACKED_ROWS = 5;  // in place of a type, for rows of this kind
constexpr int64_t PACKED_GROUP = 64;
constexpr int PACKED_LEAST = 10, PACKED_NAN = 255;  // scales, as bytes

// What the byte of a scale stands for. From PACKED_LEAST on it is float32's own exponent.
inline float packed_scale(uint8_t byte) {
    const uint32_t bits = byte == PACKED_NAN ? 0x7fc00000u : static_cast<uint32_t>(byte) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return scale;
}

// Sixteen codes times their scale.
inline F16 packed_numbers(const uint8_t* codes, float scale) {
#if defined(__AVX512F__)
    // The bits of e4m3 are those of a half float 2^8 times smaller, except that exponent 15 is none of infinity there.
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(~0x4000));
    return (F16)_mm512_cvtph_ps(halves) * (scale * 256.0f);
#else
    C16 bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    const U16 wide = __builtin_convertvector(bytes, U16), size = wide & 127;
    const F16 small = __builtin_convertvector((I16)size, F16) * 0.001953125f;
    const F16 value = (I16)size < 8 ? small : (F16)((size << 20) + (120u << 23));
    return (F16)((U16)(value * scale) | (wide & 128) << 24);
#endif
}

inline float packed_number(uint8_t code, float scale) {
    const int size = code & 127, exponent = size >> 3;
    const float value = exponent == 0 ? std::ldexp(static_cast<float>(size), -9)
                                      : std::ldexp(static_cast<float>(8 + (size & 7)), exponent - 10);
    return (code & 128 ? -value : value) * scale;
}

#if defined(__AVX512BF16__)
struct PackedGroup {
    __m512i low, high;
};

// 64 codes in bfloat16. Numbers that are normal in e4m3 only get another exponent; a group with others, which are rare,
// goes by way of float32.
__attribute__((always_inline)) inline PackedGroup packed_group(const uint8_t* codes, uint8_t byte) {
    const auto* halves = reinterpret_cast<const __m256i*>(codes);
    const __mmask64 subnormal = _mm512_testn_epi8_mask(_mm512_loadu_si512(codes), _mm512_set1_epi8(0x78));
    if (__builtin_expect(subnormal == 0 && byte != PACKED_NAN, 1)) {
        // Exponents are biased by 7 in e4m3, by 127 in bfloat16 and in the scale.
        const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>((byte - 7) << 7));
        const auto half = [&](int i) {
            const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256(halves + i)), 4);
            return _mm512_add_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(static_cast<int16_t>(0x87f0))), shift);
        };
        return {half(0), half(1)};
    }
    const float scale = packed_scale(byte);
    const auto half = [&](const uint8_t* from) {
        const F16 low = packed_numbers(from, scale), high = packed_numbers(from + 16, scale);
        return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    };
    return {half(codes), half(codes + 32)};
}
#endif

struct PackedForm {
    int64_t width, exact;

    int64_t dim() const { return width + exact; }
    int64_t nbytes() const { return (2 * exact + width + groups() + 1) / 2 * 2; }
    int64_t groups() const { return (width + PACKED_GROUP - 1) / PACKED_GROUP; }
    const bf16* exacts(const char* row) const { return reinterpret_cast<const bf16*>(row); }
    const uint8_t* codes(const char* row) const { return reinterpret_cast<const uint8_t*>(row) + 2 * exact; }
    const uint8_t* scales(const char* row) const { return codes(row) + width; }

    float number(const char* row, int64_t k) const {
        if (k >= dim()) return 0.0f;
        if (k >= width) return widen(exacts(row)[k - width]);
        return packed_number(codes(row)[k], packed_scale(scales(row)[k / PACKED_GROUP]));
    }

    // Numbers k to k + 15, k a multiple of 16; behind the end zeros.
    F16 part(const char* row, int64_t k) const {
        if (k + 16 <= width) return packed_numbers(codes(row) + k, packed_scale(scales(row)[k / PACKED_GROUP]));
        if (k >= width && k + 16 <= dim()) return load(exacts(row) + k - width);
        F16 value = fill(0.0f);
        for (int64_t i = 0; i < 16; ++i) value[i] = number(row, k + i);
        return value;
    }

#if defined(__AVX512BF16__)
    PackedGroup group(const char* row, int64_t k) const {
        return packed_group(codes(row) + k, scales(row)[k / PACKED_GROUP]);
    }

    // Numbers k to k + 31, k a multiple of 32, in bfloat16; zeros behind the end, and for a row that is null.
    __m512i narrow_part(const char* row, int64_t k) const {
        if (row == nullptr) return _mm512_setzero_si512();
        if (k >= width && k + 32 <= dim()) return _mm512_loadu_si512(exacts(row) + k - width);
        return (__m512i)_mm512_cvtne2ps_pbh((__m512)part(row, k + 16), (__m512)part(row, k));
    }
#endif

    // A whole row in float32, padded with zeros to a multiple of 32; null gives zeros.
    void unpack(const char* row, float* to) const {
        const int64_t padded = (dim() + 31) / 32 * 32;
        for (int64_t k = 0; k < padded; k += 16) store(to + k, row == nullptr ? fill(0.0f) : part(row, k));
    }
};

// Codes of sixteen numbers within 448: to the nearest, ties to even.
inline void packed_codes(F16 x, uint8_t* to) {
    const U16 bits = (U16)x, size = bits & 0x7fffffff;
    // Below 2^-6 codes count steps of 2^-9, which is what one bit of a number near 2^14 weighs.
    const U16 small = (U16)((F16)size + 16384.0f) - 0x46800000u;
    const U16 large = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120u << 3);
    const U16 code = ((I16)size < 0x3c800000 ? small : large) | (bits >> 31 << 7);
    const C16 bytes = __builtin_convertvector(code, C16);
    std::memcpy(to, &bytes, sizeof bytes);
}

// One group of up to 64 numbers -> their codes and the byte of their scale.
template <typename T>
inline uint8_t pack_group(const T* x, int64_t count, uint8_t* codes) {
    F16 values[4];
    uint32_t peak = 0;
    for (int i = 0; i < 4; ++i) {
        values[i] = fill(0.0f);
        for (int64_t k = 16 * i; k < std::min<int64_t>(count, 16 * i + 16); ++k) values[i][k % 16] = load_one(x + k);
        const U16 size = (U16)values[i] & 0x7fffffff;
        for (int lane = 0; lane < 16; ++lane) peak = std::max(peak, static_cast<uint32_t>(size[lane]));
    }
    // The exponent of 448 is 8; a mantissa above 1.75 needs one more.
    const int power = static_cast<int>((peak + 0x1fffff) >> 23) - 8;
    const int byte = peak >= 0x7f800000 ? PACKED_NAN : std::max(power, PACKED_LEAST);
    const float inverse = byte == PACKED_NAN ? 0.0f : packed_scale(static_cast<uint8_t>(254 - byte));
    for (int i = 0; i < 4; ++i) {
        uint8_t bytes[16];
        packed_codes(values[i] * inverse, bytes);
        for (int64_t k = 16 * i; k < std::min<int64_t>(count, 16 * i + 16); ++k) codes[k] = bytes[k % 16];
    }
    return static_cast<uint8_t>(byte);
}

template <typename T>
inline void pack_row(const PackedForm& form, const T* x, char* row) {
    auto* exacts = reinterpret_cast<bf16*>(row);
    auto* codes = reinterpret_cast<uint8_t*>(row) + 2 * form.exact;
    uint8_t* scales = codes + form.width;
    for (int64_t i = 0; i < form.exact; ++i) store_one(exacts + i, load_one(x + form.width + i));
    for (int64_t k = 0; k < form.width; k += PACKED_GROUP)
        scales[k / PACKED_GROUP] = pack_group(x + k, std::min(PACKED_GROUP, form.width - k), codes + k);
    // What pads a row is zero, so that equal rows are equal bytes.
    for (uint8_t* end = scales + form.groups(); end < reinterpret_cast<uint8_t*>(row) + form.nbytes(); ++end) *end = 0;
}

// rows, row stride (elements), type, places (int64), pool, rows, numbers packed, numbers kept exact
inline void keep_packed(const Word* a, const Team& team) {
    const PackedForm form{a[6], a[7]};
    const Range mine = team.share(a[5]);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
        char* row = pointer<char>(a[4]) + pointer<const int64_t>(a[3])[i] * form.nbytes();
        if (a[2] == BFLOAT16)
            pack_row(form, pointer<const bf16>(a[0]) + i * a[1], row);
        else
            pack_row(form, pointer<const float>(a[0]) + i * a[1], row);
    }
}

#define DAEDAL_PACKED_ROWS_KERNELS {"keep_packed", keep_packed},
