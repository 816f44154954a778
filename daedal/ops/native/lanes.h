// Sixteen numbers at once, in the compiler's own vector type: AVX-512, AVX2 and NEON all come of one source. Conversions
// between float32 and the narrow floats, exponentials and sums; included inside each level's namespace.
#pragma once

typedef float F16 __attribute__((vector_size(64)));       // 16 x float32
typedef int32_t I16 __attribute__((vector_size(64)));     // 16 x int32
typedef uint32_t U16 __attribute__((vector_size(64)));    // 16 x uint32
typedef uint16_t H16 __attribute__((vector_size(32)));    // 16 x uint16: bfloat16 bits
typedef int8_t B16 __attribute__((vector_size(16)));      // 16 x int8
typedef uint8_t C16 __attribute__((vector_size(16)));     // 16 x uint8

using bf16 = uint16_t;

inline F16 load(const float* from) {
    F16 value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, F16 value) { std::memcpy(to, &value, sizeof value); }

inline F16 fill(float value) { return F16{} + value; }

inline float widen(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// To the nearest, ties to even; NaN stays NaN.
inline bf16 narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>((bits >> 16) | 64);
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline F16 load(const bf16* from) {
    H16 narrow_;
    std::memcpy(&narrow_, from, sizeof narrow_);
    const U16 bits = __builtin_convertvector(narrow_, U16) << 16;
    F16 value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(bf16* to, F16 value) {
    U16 bits;
    std::memcpy(&bits, &value, sizeof bits);
    const U16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U16 nan = (bits >> 16) | 64;
    const U16 chosen = (bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
    const H16 narrow_ = __builtin_convertvector(chosen, H16);
    std::memcpy(to, &narrow_, sizeof narrow_);
}

inline float load_one(const float* from) { return *from; }
inline float load_one(const bf16* from) { return widen(*from); }
inline void store_one(float* to, float value) { *to = value; }
inline void store_one(bf16* to, float value) { *to = narrow(value); }

inline F16 max(F16 a, F16 b) { return a > b ? a : b; }
inline F16 min(F16 a, F16 b) { return a < b ? a : b; }

inline float sum(F16 value) {
    typedef float F8 __attribute__((vector_size(32)));
    typedef float F4 __attribute__((vector_size(16)));
    F8 low, high;
    std::memcpy(&low, &value, 32);
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + 32, 32);
    const F8 eight = low + high;
    F4 a, b;
    std::memcpy(&a, &eight, 16);
    std::memcpy(&b, reinterpret_cast<const char*>(&eight) + 16, 16);
    const F4 four = a + b;
    return (four[0] + four[2]) + (four[1] + four[3]);
}

inline float largest(F16 value) {
    float result = value[0];
    for (int lane = 1; lane < 16; ++lane) result = value[lane] > result ? value[lane] : result;
    return result;
}

// e^x to about one unit in the last place: 2^n times a polynomial of the rest. Below -87 it is 0, above 88 infinity.
inline F16 exponential(F16 x) {
    const F16 clipped = max(min(x, fill(88.8f)), fill(-87.4f));
    const F16 shifted = clipped * 1.44269504088896341f + 12582912.0f;
    const F16 whole = shifted - 12582912.0f;
    const F16 rest = (clipped - whole * 0.693145751953125f) - whole * 1.42860682030941723212e-6f;
    F16 p = fill(1.9875691500e-4f);
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = (p * rest) * rest + rest + 1.0f;
    // In two halves: 2^128 is no float.
    const I16 power = __builtin_convertvector(whole, I16);
    const I16 half = power >> 1;
    const I16 bits_a = (half + 127) << 23, bits_b = (power - half + 127) << 23;
    F16 a, b;
    std::memcpy(&a, &bits_a, sizeof a);
    std::memcpy(&b, &bits_b, sizeof b);
    const F16 result = (p * a) * b;
    return x < -87.4f ? fill(0.0f) : result;
}

// x / (1 + e^-x).
inline F16 silu(F16 x) { return x / (1.0f + exponential(-x)); }
