// One token drawn from one row of logits: temperature, top-k, top-p of what top-k left, and min-p, as `drawing.py` has
// them. The row is read twice, block by block: once for the mass and the maximum of each block, once for the mass of
// what is kept. Which that is, is searched for among the few logits that can be at the border: nothing is sorted.
// One thread does all: a row is a hundred kilobytes. Included inside each level's namespace.
#pragma once

constexpr int64_t DRAW_BLOCK = 128;  // logits

// What a filter keeps: all logits above `border`, and of those on it the first, up to the column `last`.
struct Kept {
    float border = -std::numeric_limits<float>::infinity();
    int64_t last = std::numeric_limits<int32_t>::max();
};

struct Draw {
    const float* row;
    int64_t columns;
    float peak, temperature;
    // Of each block; then candidates for the border, as many as columns at most.
    double* sums;
    float *peaks, *values, *weights;

    int64_t blocks() const { return (columns + DRAW_BLOCK - 1) / DRAW_BLOCK; }
    F16 weight(F16 logits) const { return exponential((logits - peak) / temperature); }

    // The logits of a block, -inf behind the last.
    const float* block(int64_t index, float* padded) const {
        const int64_t begin = index * DRAW_BLOCK, size = std::min(DRAW_BLOCK, columns - begin);
        if (size == DRAW_BLOCK) return row + begin;
        std::copy(row + begin, row + begin + size, padded);
        std::fill(padded + size, padded + DRAW_BLOCK, -std::numeric_limits<float>::infinity());
        return padded;
    }

    // The weights of 16 logits of which the first is in `column`; 0 for what is not kept.
    F16 kept_weight(F16 logits, int64_t column, const Kept& kept) const {
        const I16 lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const I16 on = (logits == kept.border) & (lanes + static_cast<int32_t>(column) <= static_cast<int32_t>(kept.last));
        return (logits > kept.border) | on ? weight(logits) : fill(0.0f);
    }
};

// Masses and maxima of all blocks; the mass of all.
inline double draw_sums(const Draw& d) {
    alignas(64) float padded[DRAW_BLOCK];
    double total = 0.0;
    for (int64_t b = 0; b < d.blocks(); ++b) {
        const float* logits = d.block(b, padded);
        F16 mass = fill(0.0f), highest = load(logits);
        for (int64_t i = 0; i < DRAW_BLOCK; i += 16) {
            const F16 x = load(logits + i);
            mass += d.weight(x);
            highest = max(highest, x);
        }
        d.sums[b] = sum(mass);
        d.peaks[b] = largest(highest);
        total += d.sums[b];
    }
    return total;
}

// Brings the highest of `size` candidates to the front, of which there are `count`, or fewer that hold `mass` together;
// how many. The search narrows a range that holds the last of them, by three parts around a number of it.
inline int64_t draw_highest(const Draw& d, int64_t size, int64_t count, double mass) {
    int64_t begin = 0, end = size;
    double held = 0.0;
    for (;;) {
        const float a = d.values[begin], b = d.values[begin + (end - begin) / 2], c = d.values[end - 1];
        const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        int64_t above = begin, below = end;
        double mass_above = 0.0;
        for (int64_t i = begin; i < below;) {
            const float value = d.values[i];
            if (value > pivot) {
                mass_above += d.weights[i];
                std::swap(d.values[i], d.values[above]);
                std::swap(d.weights[i++], d.weights[above++]);
            } else if (value < pivot) {
                std::swap(d.values[i], d.values[--below]);
                std::swap(d.weights[i], d.weights[below]);
            } else {
                ++i;
            }
        }
        if (above > begin && (above >= count || held + mass_above >= mass)) {
            end = above;
            continue;
        }
        held += mass_above;
        for (begin = above; begin < below && begin < count && held < mass; ++begin) held += d.weights[begin];
        if (begin < below || begin == end || begin == count || held >= mass) return begin;
    }
}

// Logits of at least `floor`, and their weights, as candidates; how many.
inline int64_t draw_candidates(const Draw& d, float floor) {
    int64_t size = 0;
    for (int64_t b = 0; b < d.blocks(); ++b) {
        if (d.peaks[b] < floor) continue;
        const int64_t end = std::min(d.columns, (b + 1) * DRAW_BLOCK);
        for (int64_t i = b * DRAW_BLOCK; i < end; ++i) {
            d.values[size] = d.row[i];
            size += d.row[i] >= floor;
        }
    }
    for (int64_t i = 0; i < size; i += 16) store(d.weights + i, d.weight(load(d.values + i)));
    return size;
}

// No logit below it is kept. Where top-k keeps no more logits than there are blocks, as many maxima of blocks are at
// least it; top-p lets go of less mass than all that weigh so little can have together.
inline float draw_floor(const Draw& d, int64_t top_k, double top_p, double min_p, double total) {
    float floor = -std::numeric_limits<float>::infinity();
    if (top_k > 0 && top_k <= d.blocks()) {
        std::copy(d.peaks, d.peaks + d.blocks(), d.values);
        std::nth_element(d.values, d.values + top_k - 1, d.values + d.blocks(), std::greater<float>());
        return d.values[top_k - 1];
    }
    double least = min_p;
    if (top_p < 1.0 && top_k == 0) least = std::max(least, (1.0 - top_p) * total / static_cast<double>(d.columns));
    // Half of it, so that no rounding of weights matters.
    if (least > 0.0 && top_k == 0) floor = d.peak + d.temperature * static_cast<float>(std::log(least / 2.0));
    return floor;
}

inline Kept draw_kept(const Draw& d, int64_t top_k, double top_p, double min_p, double total) {
    int64_t size = draw_candidates(d, draw_floor(d, top_k, top_p, min_p, total));
    const double all = std::numeric_limits<double>::infinity();
    Kept kept;
    if (top_k == 0 && top_p >= 1.0) {
        kept.border = d.peak;
        for (int64_t i = 0; i < size; ++i)
            if (d.weights[i] >= min_p) kept.border = std::min(kept.border, d.values[i]);
        return kept;
    }
    if (top_k > 0) {
        size = draw_highest(d, size, top_k, all);
        total = 0.0;
        for (int64_t i = 0; i < size; ++i) total += d.weights[i];
    }
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) count += d.weights[i] >= min_p;
    const int64_t num_kept = draw_highest(d, size, std::max<int64_t>(count, 1), top_p < 1.0 ? top_p * total : all);
    kept.border = *std::min_element(d.values, d.values + num_kept);
    int64_t ties = std::count(d.values, d.values + num_kept, kept.border);
    for (int64_t b = 0; b < d.blocks() && ties > 0; ++b) {
        if (d.peaks[b] < kept.border) continue;
        const int64_t end = std::min(d.columns, (b + 1) * DRAW_BLOCK);
        for (int64_t i = b * DRAW_BLOCK; i < end && ties > 0; ++i)
            if (d.row[i] == kept.border && --ties == 0) kept.last = i;
    }
    return kept;
}

// The column at the fraction `uniform` of what is kept, whose masses the blocks' sums are.
inline int64_t draw_column(const Draw& d, const Kept& kept, double total, double uniform) {
    // Rounding must not lead beyond the last that has any weight.
    double rest = uniform * total;
    int64_t block = 0;
    bool found = false;
    for (int64_t b = 0; b < d.blocks(); ++b) {
        if (d.sums[b] <= 0.0) continue;
        if (found) rest -= d.sums[block];
        found = true, block = b;
        if (rest < d.sums[b]) break;
    }
    alignas(64) float padded[DRAW_BLOCK], weights[DRAW_BLOCK];
    const float* logits = d.block(block, padded);
    for (int64_t i = 0; i < DRAW_BLOCK; i += 16)
        store(weights + i, d.kept_weight(load(logits + i), block * DRAW_BLOCK + i, kept));
    int64_t column = 0;
    for (int64_t i = 0; i < DRAW_BLOCK; ++i) {
        if (weights[i] <= 0.0f) continue;
        column = i;
        if (rest < weights[i]) break;
        rest -= weights[i];
    }
    return block * DRAW_BLOCK + column;
}

// row float32 [columns], columns, temperature, top_k (0 for none), top_p, min_p, uniform, place int64, scratch: a double
// and a float for each block, two floats for each column, and 32 floats more
inline void draw(const Word* a, const Team& team) {
    if (team.rank != 0) return;
    Draw d;
    d.row = pointer<const float>(a[0]), d.columns = a[1], d.temperature = real(a[2]);
    d.sums = pointer<double>(a[8]);
    d.peaks = reinterpret_cast<float*>(d.sums + d.blocks());
    d.values = d.peaks + d.blocks();
    d.weights = d.values + d.columns + 16;
    double top_p, min_p, uniform;
    std::memcpy(&top_p, a + 4, sizeof top_p);
    std::memcpy(&min_p, a + 5, sizeof min_p);
    std::memcpy(&uniform, a + 6, sizeof uniform);
    d.peak = peak_of(d.row, 0, d.columns).value;
    double total = draw_sums(d);
    const int64_t top_k = a[3] < d.columns ? a[3] : 0;
    Kept kept;
    if (top_k > 0 || top_p < 1.0 || min_p > 0.0) {
        kept = draw_kept(d, top_k, top_p, min_p, total);
        total = 0.0;
        alignas(64) float padded[DRAW_BLOCK];
        for (int64_t b = 0; b < d.blocks(); ++b) {
            d.sums[b] = 0.0;
            if (d.peaks[b] < kept.border) continue;
            const float* logits = d.block(b, padded);
            F16 mass = fill(0.0f);
            for (int64_t i = 0; i < DRAW_BLOCK; i += 16)
                mass += d.kept_weight(load(logits + i), b * DRAW_BLOCK + i, kept);
            d.sums[b] = sum(mass);
            total += d.sums[b];
        }
    }
    *pointer<int64_t>(a[7]) = draw_column(d, kept, total, uniform);
}

#define DAEDAL_DRAW_KERNELS {"draw", draw},
