// Kernels that go over rows: norms, rotation, gated units, routing, and the plain tensor operations (copies, sums,
// gathers) that join the others in a recorded step. All compute in float32. Included inside each level's namespace.
#pragma once

// Element types of arguments, as `program.py` numbers them.
enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, INT64 = 2, INT32 = 3, BOOL = 4 };

template <typename T, typename W>
inline void norm_row(const T* x, const W* weight, T* y, int64_t dim, float eps) {
    F16 squares = fill(0.0f);
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
        const F16 value = load(x + i);
        squares += value * value;
    }
    for (; i < dim; ++i) rest += load_one(x + i) * load_one(x + i);
    const float scale = 1.0f / std::sqrt((sum(squares) + rest) / static_cast<float>(dim) + eps);
    for (i = 0; i + 16 <= dim; i += 16) {
        const F16 value = load(x + i) * scale;
        store(y + i, weight == nullptr ? value : value * load(weight + i));
    }
    for (; i < dim; ++i) {
        const float value = load_one(x + i) * scale;
        store_one(y + i, weight == nullptr ? value : value * load_one(weight + i));
    }
}

// x, x row stride (elements), x type, weight or null, weight type, y (contiguous), rows, dim, eps
inline void rms_norm(const Word* a, const Team& team) {
    const int64_t rows = a[6], dim = a[7];
    const float eps = real(a[8]);
    const Range mine = team.share(rows);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const auto typed = [&](auto* x, auto* y) {
            if (a[4] == BFLOAT16)
                norm_row(x + row * a[1], pointer<const bf16>(a[3]), y + row * dim, dim, eps);
            else
                norm_row(x + row * a[1], pointer<const float>(a[3]), y + row * dim, dim, eps);
        };
        if (a[2] == BFLOAT16)
            typed(pointer<const bf16>(a[0]), pointer<bf16>(a[5]));
        else
            typed(pointer<const float>(a[0]), pointer<float>(a[5]));
    }
}

// Rotates pairs of one head's numbers: (2i, 2i + 1) where interleaved, else (i, i + half).
template <typename T>
inline void rotate_head(const T* x, const float* cosine, const float* sine, T* y, int64_t half, bool interleaved) {
    const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
    for (int64_t i = 0; i < half; ++i) {
        const float first = load_one(x + i * step), second = load_one(x + i * step + apart);
        store_one(y + i * step, first * cosine[i] - second * sine[i]);
        store_one(y + i * step + apart, second * cosine[i] + first * sine[i]);
    }
}

// x, stride of a token, stride of a head, type, cos, sin (float32 [T, C]), y (contiguous), T, H, C, interleaved
inline void rotary(const Word* a, const Team& team) {
    const int64_t heads = a[8], half = a[9];
    const Range mine = team.share(a[7] * heads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t token = i / heads, head = i % heads, from = token * a[1] + head * a[2];
        const float* cosine = pointer<const float>(a[4]) + token * half;
        const float* sine = pointer<const float>(a[5]) + token * half;
        if (a[3] == BFLOAT16)
            rotate_head(pointer<const bf16>(a[0]) + from, cosine, sine, pointer<bf16>(a[6]) + i * 2 * half, half, a[10]);
        else
            rotate_head(pointer<const float>(a[0]) + from, cosine, sine, pointer<float>(a[6]) + i * 2 * half, half,
                        a[10]);
    }
}

// positions (int64), frequencies (float32), cos, sin (float32 [T, C]), T, C, scale
inline void angles(const Word* a, const Team& team) {
    const int64_t half = a[5];
    const float scale = real(a[6]);
    const Range mine = team.share(a[4]);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
        const float position = static_cast<float>(pointer<const int64_t>(a[0])[t]);
        for (int64_t i = 0; i < half; ++i) {
            const float angle = position * pointer<const float>(a[1])[i];
            pointer<float>(a[2])[t * half + i] = std::cos(angle) * scale;
            pointer<float>(a[3])[t * half + i] = std::sin(angle) * scale;
        }
    }
}

template <typename T>
inline void gate_row(const T* gate, const T* up, T* y, int64_t dim, float limit) {
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
        // The limit comes first in each comparison, so that NaN passes.
        const F16 g = min(fill(limit), load(gate + i)), u = max(fill(-limit), min(fill(limit), load(up + i)));
        store(y + i, silu(g) * u);
    }
    for (; i < dim; ++i) {
        const float g = std::min(load_one(gate + i), limit), u = std::clamp(load_one(up + i), -limit, limit);
        store_one(y + i, g / (1.0f + std::exp(-g)) * u);
    }
}

// gate, its row stride, up, its row stride, type, y (contiguous), rows, dim, limit (infinity for none)
inline void swiglu(const Word* a, const Team& team) {
    const float limit = real(a[8]);
    const Range mine = team.share(a[6]);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        if (a[4] == BFLOAT16)
            gate_row(pointer<const bf16>(a[0]) + row * a[1], pointer<const bf16>(a[2]) + row * a[3],
                     pointer<bf16>(a[5]) + row * a[7], a[7], limit);
        else
            gate_row(pointer<const float>(a[0]) + row * a[1], pointer<const float>(a[2]) + row * a[3],
                     pointer<float>(a[5]) + row * a[7], a[7], limit);
    }
}

enum Scoring : int { SOFTMAX = 0, SIGMOID = 1, SQRT_SOFTPLUS = 2 };
enum Method : int { GREEDY = 0, GROUP_LIMITED = 1, CORRECTED = 2 };

inline void score_experts(const float* logits, float* scores, int64_t experts, int scoring) {
    if (scoring == SOFTMAX) {
        const float top = *std::max_element(logits, logits + experts);
        float total = 0.0f;
        for (int64_t e = 0; e < experts; ++e) total += scores[e] = std::exp(logits[e] - top);
        for (int64_t e = 0; e < experts; ++e) scores[e] /= total;
        return;
    }
    for (int64_t e = 0; e < experts; ++e) {
        const float x = logits[e];
        if (scoring == SIGMOID) {
            scores[e] = 1.0f / (1.0f + std::exp(-x));
        } else {
            const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
            scores[e] = std::sqrt(std::max(softplus, std::numeric_limits<float>::min()));
        }
    }
}

// The place of the largest of `count` values that is not taken yet; ties to the lowest. NaN is passed over.
inline int64_t best_left(const float* values, const bool* taken, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    return best;
}

// Leaves in `choice` what experts outside the best groups count for: 0, or less than everything.
inline void limit_groups(float* choice, bool* taken, int64_t experts, int64_t groups, int64_t kept, int method) {
    const int64_t size = experts / groups;
    float rank[512];
    for (int64_t g = 0; g < groups; ++g) {
        float first = -std::numeric_limits<float>::infinity(), second = first;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) {
            if (choice[e] > first) {
                second = first;
                first = choice[e];
            } else if (choice[e] > second) {
                second = choice[e];
            }
        }
        rank[g] = method == CORRECTED ? first + second : first;
        taken[g] = false;
    }
    for (int64_t k = 0; k < kept; ++k) taken[best_left(rank, taken, groups)] = true;
    const float excluded = method == CORRECTED ? -std::numeric_limits<float>::infinity() : 0.0f;
    for (int64_t e = 0; e < experts; ++e)
        if (!taken[e / size]) choice[e] = excluded;
}

// logits (float32 [T, E]), bias or null, given ids (int64 [T, A]) or null, ids, weights, scratch (float32 [T, 2E]),
// T, E, A, scoring, method, groups, groups kept, normalise, scale
inline void route(const Word* a, const Team& team) {
    const int64_t experts = a[7], active = a[8];
    const int method = static_cast<int>(a[10]);
    const float* bias = pointer<const float>(a[1]);
    const Range mine = team.share(a[6]);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
        float* scores = pointer<float>(a[5]) + t * 2 * experts;
        float* choice = scores + experts;
        int64_t* ids = pointer<int64_t>(a[3]) + t * active;
        float* weights = pointer<float>(a[4]) + t * active;
        score_experts(pointer<const float>(a[0]) + t * experts, scores, experts, static_cast<int>(a[9]));
        if (a[2] != 0) {
            std::memcpy(ids, pointer<const int64_t>(a[2]) + t * active, active * sizeof *ids);
        } else {
            bool taken[4096];
            for (int64_t e = 0; e < experts; ++e) choice[e] = scores[e] + (bias == nullptr ? 0.0f : bias[e]);
            if (method != GREEDY) limit_groups(choice, taken, experts, a[11], a[12], method);
            std::fill(taken, taken + experts, false);
            for (int64_t k = 0; k < active; ++k) {
                ids[k] = best_left(choice, taken, experts);
                taken[ids[k]] = true;
            }
        }
        float total = 0.0f;
        for (int64_t k = 0; k < active; ++k) total += weights[k] = scores[ids[k]];
        for (int64_t k = 0; k < active; ++k) weights[k] = (a[13] ? weights[k] / (total + 1e-20f) : weights[k]) * real(a[14]);
    }
}

// table (rows of whole bytes), index (int64), out, count, bytes of a row
inline void gather_rows(const Word* a, const Team& team) {
    const Range mine = team.share(a[3]);
    for (int64_t i = mine.begin; i < mine.end; ++i)
        std::memcpy(pointer<char>(a[2]) + i * a[4], pointer<const char>(a[0]) + pointer<const int64_t>(a[1])[i] * a[4], a[4]);
}

// table, index (int64), rows, count, bytes of a row: the inverse; indices do not repeat
inline void scatter_rows(const Word* a, const Team& team) {
    const Range mine = team.share(a[3]);
    for (int64_t i = mine.begin; i < mine.end; ++i)
        std::memcpy(pointer<char>(a[0]) + pointer<const int64_t>(a[1])[i] * a[4], pointer<const char>(a[2]) + i * a[4], a[4]);
}

#define DAEDAL_ROWS_KERNELS                                                                                       \
    {"rms_norm", rms_norm}, {"rotary", rotary}, {"swiglu", swiglu}, {"angles", angles}, {"route", route}, {"gather_rows", gather_rows}, \
        {"scatter_rows", scatter_rows},
