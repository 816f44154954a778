// Causal attention of a ragged batch over rows on pages or side by side, without writing a score matrix
// (FlashAttention-2; the absorbed form of latent attention is one key head shared by all query heads, whose rows are
// also the values: DeepSeek-V2, section 2.1.2).
//
// A unit is some (query, head) pairs of one sequence that share a key head. Its keys are cut into chunks of a size that
// follows from the unit alone. Each chunk gives maxima, sums and weighted values, which are folded in the order of the
// chunks: so neither the number of threads nor the rest of the batch changes a result. Threads take stretches of the
// list of all chunks of all units; where a unit falls to several threads, its chunks are folded at the end.
//
// Lengths and page tables are read when the kernel runs. Rows beyond a sequence's length are never read as values, and
// their scores are cast away, so that they may hold anything.
#pragma once

// 2^x. Below -126 it is 0.
inline F16 power_of_two(F16 x) {
#if defined(__AVX512F__)
    const F16 whole = (F16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const F16 lowest = fill(-127.0f);
    x = max(x, lowest);
    const F16 whole = (x + 12582912.0f) - 12582912.0f;
#endif
    const F16 rest = x - whole;
    F16 p = fill(1.3276430973e-3f);
    p = p * rest + 9.6755414895e-3f;
    p = p * rest + 5.5507134044e-2f;
    p = p * rest + 2.4022119723e-1f;
    p = p * rest + 6.9314696698e-1f;
    p = p * rest + 1.0f;
#if defined(__AVX512F__)
    return (F16)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    const I16 bits = (__builtin_convertvector(whole, I16) + 127) << 23;
    F16 power;
    std::memcpy(&power, &bits, sizeof power);
    return x > lowest ? p * power : fill(0.0f);
#endif
}

#include "attention_dot.h"
#include "attention_wide.h"

// Keys that are worked on at once, and the most chunks of a unit. Short sequences are cut finer, so that more threads
// have a part in them.
constexpr int64_t ATTENTION_BLOCK = 128;
constexpr int64_t ATTENTION_CHUNKS = 64;
constexpr int64_t ATTENTION_SHORT = 512;

// Rows of one kind: where row s of a sequence lies. Strides in bytes.
struct AttentionRows {
    const char* pool;
    int64_t page_stride, row_stride, head_stride;
    const int32_t* table;
    int64_t width, page_size;

    // Addresses of rows `from` to `from + count` of one head; null from `length` on.
    void find(int64_t sequence, int64_t head, int64_t from, int64_t count, int64_t length, const void** rows) const {
        int64_t s = from;
        const int64_t end = from + count, held = std::min(end, length);
        while (s < held) {
            const int64_t page = s / page_size, place = s % page_size;
            const int64_t stop = std::min(held, s - place + page_size);
            const char* row = pool + table[sequence * width + page] * page_stride + head * head_stride;
            for (row += place * row_stride; s < stop; ++s, row += row_stride) *rows++ = row;
        }
        for (; s < end; ++s) *rows++ = nullptr;
    }
};

struct AttentionJob {
    const char* queries;
    int64_t token_stride, head_stride;
    int query_type;
    char* out;
    const int32_t* starts;
    int64_t num_sequences, num_heads, num_groups, key_dim, value_dim;
    float scale;
    const int32_t* lengths;
    int row_type;
    AttentionRows keys, values;
    int64_t threads, slots, unit_rows;
    PackedForm packed;  // of rows that are; their values are the same rows

    bool is_packed() const { return row_type == PACKED_ROWS; }
    int64_t query_size() const { return query_type == BFLOAT16 ? 2 : 4; }
    int64_t repeats() const { return num_heads / num_groups; }
    int64_t padded_key() const { return (key_dim + 31) / 32 * 32; }
    int64_t value_tiles() const { return (value_dim + 31) / 32 * 2; }
    int64_t unit_tiles() const { return unit_rows / 16; }
    // Floats of what a chunk gives for 16 rows: maxima, sums, and tiles of weighted values.
    int64_t record() const { return 32 + value_tiles() * 256; }
};

// Some rows of one sequence that share a key head. Row i is query i / repeats and the head's i % repeats.
struct AttentionUnit {
    int64_t sequence, head, begin, rows, length, tokens, repeats;
    int64_t weight, chunk;

    int64_t tiles() const { return (rows + 15) / 16; }
    // How many keys row i of the unit sees.
    int64_t limit(int64_t row) const {
        return std::max<int64_t>(0, length - tokens + (begin + std::min(row, rows - 1)) / repeats + 1);
    }
    int64_t keys() const { return limit(rows - 1); }
    int64_t chunks() const { return std::max<int64_t>(1, (keys() + chunk - 1) / chunk); }
    // What a chunk costs, in keys read by 16 queries; the constant stands for its start and its folding.
    int64_t chunk_weight(int64_t index) const {
        return (std::min(chunk, keys() - index * chunk) + 32) * tiles();
    }
    // Where in the order of all work a chunk counts, that begins at `position`: its middle.
    int64_t place(int64_t position, int64_t index) const { return position + chunk_weight(index) / 2; }
};

// The maximum of a row that has seen no key, and the score of a hidden one: both finite, the second far below.
constexpr float ATTENTION_UNSEEN = -1e25f, ATTENTION_HIDDEN = -1e30f;

// Calls visit(unit, position of its first chunk in the order of all work) for every unit; returns the work in all.
template <typename Visit>
inline int64_t attention_units(const AttentionJob& job, const Visit& visit) {
    int64_t position = 0;
    AttentionUnit unit;
    unit.repeats = job.repeats();
    for (unit.sequence = 0; unit.sequence < job.num_sequences; ++unit.sequence) {
        unit.tokens = job.starts[unit.sequence + 1] - job.starts[unit.sequence];
        unit.length = job.lengths[unit.sequence];
        const int64_t rows = unit.tokens * unit.repeats;
        for (unit.head = 0; unit.head < job.num_groups; ++unit.head) {
            for (unit.begin = 0; unit.begin < rows; unit.begin += job.unit_rows) {
                unit.rows = std::min(job.unit_rows, rows - unit.begin);
                // Folding costs as much for short chunks as for long ones, and more the more rows there are.
                const bool is_short = unit.tiles() == 1 && unit.keys() <= ATTENTION_SHORT;
                int64_t least = ATTENTION_BLOCK * (unit.tiles() > 2 ? 4 : unit.tiles());
                if (is_short) least = ATTENTION_BLOCK / 2;
                unit.chunk = least * ((unit.keys() + least * ATTENTION_CHUNKS - 1) / (least * ATTENTION_CHUNKS));
                unit.chunk = std::max(unit.chunk, least);
                const int64_t chunks = unit.chunks();
                unit.weight = (chunks - 1) * unit.chunk_weight(0) + unit.chunk_weight(chunks - 1);
                visit(unit, position);
                position += unit.weight;
            }
        }
    }
    return position;
}

// Divides the order of all work among threads: who does the chunk at a place.
struct AttentionShare {
    int64_t total, threads;

    int64_t owner(int64_t place) const {
        int64_t thread = std::min(threads - 1, place * threads / std::max<int64_t>(total, 1));
        while (thread + 1 < threads && begin(thread + 1) <= place) ++thread;
        while (begin(thread) > place) --thread;
        return thread;
    }
    int64_t begin(int64_t thread) const { return total * thread / threads; }
};

// Adds a later chunk's record to a total's, for value tiles `from` to `to`; `factors` come of `attention_factors`.
inline void attention_fold(float* total, const float* later, const float* factors, int64_t from, int64_t to) {
    for (int64_t tile = from; tile < to; ++tile) {
        float* a = total + 32 + tile * 256;
        const float* b = later + 32 + tile * 256;
        for (int row = 0; row < 16; ++row)
            store(a + row * 16, load(a + row * 16) * factors[row] + load(b + row * 16) * factors[16 + row]);
    }
}

// Takes a later record's maxima and sums into `state` (16 maxima, 16 sums) and gives both sides' factors.
inline void attention_factors(float* state, const float* later, float* factors) {
    const F16 before = load(state), other = load(later), highest = max(before, other);
    const F16 a = power_of_two(before - highest), b = power_of_two(other - highest);
    store(state, highest);
    store(state + 16, load(state + 16) * a + load(later + 16) * b);
    store(factors, a);
    store(factors + 16, b);
}

// One thread's work: its scratch, and the unit that it is at.
template <typename Engine>
struct AttentionWorker {
    using Number = typename Engine::Number;
    const AttentionJob& job;
    Number *queries, *keys, *weights;
    float* sums;  // [2 + slots][tiles][record]: the total of a unit, the chunk at hand, and chunks for other threads
    const AttentionUnit* unit = nullptr;

    float* records(int64_t index) const { return sums + index * job.unit_tiles() * job.record(); }

    void take(const AttentionUnit& taken) {
        unit = &taken;
        for (int64_t tile = 0; tile < unit->tiles(); ++tile) {
            const void* rows[16];
            const int count = static_cast<int>(std::min<int64_t>(16, unit->rows - tile * 16));
            for (int i = 0; i < count; ++i) rows[i] = query(tile * 16 + i);
            Engine::pack_queries(rows, count, job.key_dim, job.query_type, queries + tile * job.padded_key() * 16);
        }
    }

    const char* query(int64_t row) const {
        const int64_t token = job.starts[unit->sequence] + (unit->begin + row) / unit->repeats;
        const int64_t head = unit->head * unit->repeats + (unit->begin + row) % unit->repeats;
        return job.queries + (token * job.token_stride + head * job.head_stride) * job.query_size();
    }

    // Chunk `index` of the unit -> its records.
    void run(int64_t index, float* to) {
        const int64_t from = index * unit->chunk, end = std::min(unit->keys(), from + unit->chunk);
        for (int64_t tile = 0; tile < unit->tiles(); ++tile) {
            float* record = to + tile * job.record();
            store(record, fill(ATTENTION_UNSEEN));
            store(record + 16, fill(0.0f));
            if (unit->limit(tile * 16 + 15) <= from) std::memset(record + 32, 0, job.value_tiles() * 1024);
        }
        // Few queries do little with a key: it should still be in the nearest cache when it is read as a value.
        const int64_t step = unit->tiles() > 2 ? ATTENTION_BLOCK : ATTENTION_BLOCK / 2;
        for (int64_t s = from; s < end; s += step) block(s, std::min(end, s + step), s == from, to);
    }

    void block(int64_t from, int64_t end, bool fresh, float* to) {
        const Number* key_tiles[ATTENTION_BLOCK / 16];
        int64_t strides[ATTENTION_BLOCK / 16];
        find_keys(from, end - from, key_tiles, strides);
        int counts[64];
        for (int64_t tile = 0; tile < unit->tiles(); ++tile) {
            const int64_t seen = std::min(end, unit->limit(tile * 16 + 15)) - from;
            counts[tile] = static_cast<int>(seen <= 0 ? 0 : (seen + 31) / 32 * 32);
            if (counts[tile]) weigh(tile, from, counts[tile], key_tiles, strides, fresh, to + tile * job.record());
        }
        weighted_values(from, counts, fresh, to);
    }

    // Adds weights times values, some columns at a time, so that packed values stay in the nearest cache.
    void weighted_values(int64_t from, const int* counts, bool fresh, float* to) {
        const int count = counts[unit->tiles() - 1];
        const void* rows[ATTENTION_BLOCK];
        const int type = find_values(from, count, rows);
        alignas(64) Number packed[ATTENTION_BLOCK * Engine::COLUMNS];
        for (int64_t column = 0; column < job.value_dim; column += Engine::COLUMNS) {
            Engine::pack_values(rows, count, column, job.value_dim, type, packed);
            const int64_t left = job.value_tiles() - column / 16;
            const int tiles = static_cast<int>(std::min<int64_t>(Engine::COLUMNS / 16, left));
            for (int64_t tile = 0; tile < unit->tiles(); ++tile) {
                if (!counts[tile]) continue;
                const int live = static_cast<int>(std::min<int64_t>(16, unit->rows - tile * 16));
                Engine::accumulate(weights + tile * 16 * ATTENTION_BLOCK, ATTENTION_BLOCK, live, counts[tile], packed,
                                   tiles, fresh, to + tile * job.record() + 32 + column * 16);
            }
        }
    }

    // Tiles of 16 key rows: where they lie, if they lie side by side and need no widening or padding, else a copy.
    void find_keys(int64_t from, int64_t count, const Number** tiles, int64_t* strides) {
        const void* rows[ATTENTION_BLOCK];
        const int64_t padded = (count + 31) / 32 * 32;
        job.keys.find(unit->sequence, unit->head, from, padded, unit->length, rows);
        const bool may = sizeof(Number) == 2 && !job.is_packed() && job.key_dim % 32 == 0 && job.keys.page_size >= 16 &&
                         (unit->tiles() <= 2 || job.num_groups == 1);
        for (int64_t s = 0; s < padded; s += 16) {
            const char *first = static_cast<const char*>(rows[s]), *last = static_cast<const char*>(rows[s + 15]);
            if (may && last != nullptr && last == first + 15 * job.keys.row_stride) {
                tiles[s / 16] = reinterpret_cast<const Number*>(first);
                strides[s / 16] = job.keys.row_stride;
                continue;
            }
            Number* copy = keys + s * job.padded_key();
            for (int64_t i = 0; i < 16; ++i) copy_key(rows[s + i], copy + i * job.padded_key());
            tiles[s / 16] = copy;
            strides[s / 16] = job.padded_key() * static_cast<int64_t>(sizeof(Number));
        }
    }

    void copy_key(const void* row, Number* to) const {
        if (job.is_packed())
            Engine::unpack(static_cast<const char*>(row), job.packed, job.padded_key(), to);
        else
            Engine::copy_key(row, job.key_dim, job.row_type, to);
    }

    // Addresses of `count` rows, and the type of their numbers: packed ones were unpacked as keys.
    int find_values(int64_t from, int64_t count, const void** rows) const {
        if (!job.is_packed()) {
            job.values.find(unit->sequence, unit->head, from, count, unit->length, rows);
            return job.row_type;
        }
        for (int64_t s = 0; s < count; ++s) rows[s] = keys + s * job.padded_key();
        return sizeof(Number) == 2 ? BFLOAT16 : FLOAT32;
    }

    // The block's weights for 16 rows; carries their maxima, sums and weighted values along.
    void weigh(int64_t tile, int64_t from, int count, const Number* const* key_tiles, const int64_t* strides,
               bool fresh, float* record) {
        alignas(64) float scores[ATTENTION_BLOCK * 16];
        const int64_t dim = job.padded_key();
        Engine::scores(key_tiles, strides, count / 16, queries + tile * dim * 16, dim, scores);
        const float scale = job.scale * 1.44269504088896341f;
        const int open = static_cast<int>(std::min<int64_t>(count, unit->limit(tile * 16) - from));
        hide(tile, from, std::max(0, open), count, ATTENTION_HIDDEN / scale, scores);
        F16 highest = load(scores);
        for (int s = 1; s < count; ++s) highest = max(highest, load(scores + s * 16));
        const F16 before = load(record), now = max(before, highest * scale);
        const F16 factor = power_of_two(before - now);
        Number* to = weights + tile * 16 * ATTENTION_BLOCK;
        const F16 sum = Engine::weigh(scores, count, scale, now, to, ATTENTION_BLOCK);
        store(record, now);
        store(record + 16, load(record + 16) * factor + sum);
        if (fresh) return;
        alignas(64) float factors[16];
        store(factors, factor);
        for (int row = 0; row < 16; ++row) {
            if (factors[row] == 1.0f) continue;
            for (int64_t i = 0; i < job.value_tiles(); ++i) {
                float* at = record + 32 + i * 256 + row * 16;
                store(at, load(at) * factors[row]);
            }
        }
    }

    // Keys from `open` on, which some of the 16 rows do not see.
    void hide(int64_t tile, int64_t from, int open, int count, float hidden, float* scores) const {
        if (open >= count) return;
        I16 limits;
        for (int row = 0; row < 16; ++row) limits[row] = static_cast<int32_t>(unit->limit(tile * 16 + row) - from);
        for (int s = open; s < count; ++s) store(scores + s * 16, limits > s ? load(scores + s * 16) : fill(hidden));
    }

    // Writes value tiles `begin` to `end` (even numbers) of 16 rows, given their sums.
    void finish(int64_t tile, const float* record, const float* totals, int64_t begin, int64_t end) const {
        const int64_t live = std::min<int64_t>(16, unit->rows - tile * 16);
        for (int64_t i = 0; i < live; ++i) {
            const int64_t row = unit->begin + tile * 16 + i;
            const int64_t token = job.starts[unit->sequence] + row / unit->repeats;
            const int64_t head = unit->head * unit->repeats + row % unit->repeats;
            const float inverse = totals[i] > 0.0f ? 1.0f / totals[i] : 0.0f;
            for (int64_t pair = begin; pair < end; pair += 2) {
                F16 low = load(record + 32 + pair * 256 + i * 16) * inverse;
                F16 high = load(record + 32 + (pair + 1) * 256 + i * 16) * inverse;
                Engine::straighten(low, high);
                write((token * job.num_heads + head) * job.value_dim, pair * 16, low);
                write((token * job.num_heads + head) * job.value_dim, pair * 16 + 16, high);
            }
        }
    }

    void write(int64_t row, int64_t column, F16 value) const {
        const int64_t left = job.value_dim - column;
        const auto typed = [&](auto* to) {
            if (left >= 16) return Engine::write(to, value);
            for (int64_t i = 0; i < left; ++i) store_one(to + i, value[i]);
        };
        if constexpr (sizeof(Number) == 2)
            typed(reinterpret_cast<bf16*>(job.out) + row + column);
        else if (job.query_type == BFLOAT16)
            typed(reinterpret_cast<bf16*>(job.out) + row + column);
        else
            typed(reinterpret_cast<float*>(job.out) + row + column);
    }

    // This thread's chunks of one unit.
    void work(const AttentionUnit& taken, int64_t position, int64_t begin, int64_t end) {
        if (position + taken.weight <= begin || position >= end) return;
        const bool leads = taken.place(position, 0) >= begin;
        const int64_t chunks = taken.chunks();
        bool packed = false;
        for (int64_t index = 0; index < chunks; position += taken.chunk_weight(index++)) {
            const int64_t place = taken.place(position, index);
            if (place < begin) continue;
            if (place >= end) break;
            if (!packed) take(taken);
            packed = true;
            run(index, records(!leads ? 2 + index : index == 0 ? 0 : 1));
            if (leads && index > 0) fold(records(0), records(1));
            if (leads && index == chunks - 1)
                for (int64_t tile = 0; tile < taken.tiles(); ++tile) {
                    const float* record = records(0) + tile * job.record();
                    finish(tile, record, record + 16, 0, job.value_tiles());
                }
        }
    }

    void fold(float* total, const float* later) const {
        for (int64_t tile = 0; tile < unit->tiles(); ++tile, total += job.record(), later += job.record()) {
            alignas(64) float factors[32];
            attention_factors(total, later, factors);
            attention_fold(total, later, factors, 0, job.value_tiles());
        }
    }
};

// What several threads did of one unit, folded and written by all threads together.
template <typename Engine, typename Worker>
inline void attention_join(const AttentionJob& job, const AttentionUnit& unit, int64_t position,
                           const AttentionShare& share, const Worker& worker_of, const Team& team) {
    const int64_t chunks = unit.chunks(), first = share.owner(unit.place(position, 0));
    const int64_t last = position + unit.weight - unit.chunk_weight(chunks - 1);
    if (share.owner(unit.place(last, chunks - 1)) == first) return;
    AttentionWorker<Engine> leader = worker_of(first);
    leader.unit = &unit;
    const int64_t pairs = job.value_tiles() / 2;
    const Range mine = team.share(unit.tiles() * pairs);
    for (int64_t tile = mine.begin / pairs; tile * pairs < mine.end; ++tile) {
        const int64_t from = std::max(mine.begin - tile * pairs, int64_t{0}) * 2;
        const int64_t to = std::min(mine.end - tile * pairs, pairs) * 2;
        float* record = leader.records(0) + tile * job.record();
        alignas(64) float state[32], factors[32];
        std::memcpy(state, record, sizeof state);
        int64_t at = position;
        for (int64_t index = 0; index < chunks; at += unit.chunk_weight(index++)) {
            const int64_t owner = share.owner(unit.place(at, index));
            if (owner == first) continue;
            const float* later = worker_of(owner).records(2 + index) + tile * job.record();
            attention_factors(state, later, factors);
            attention_fold(record, later, factors, from, to);
        }
        leader.finish(tile, record, state + 16, from, to);
    }
}

template <typename Engine>
inline void attend(const AttentionJob& job, const Word* scratch, const Team& team) {
    using Number = typename Engine::Number;
    const auto worker_of = [&](int64_t thread) {
        const int64_t rows = job.unit_rows;
        return AttentionWorker<Engine>{job, pointer<Number>(scratch[0]) + thread * rows * job.padded_key(),
                                       pointer<Number>(scratch[1]) + thread * ATTENTION_BLOCK * job.padded_key(),
                                       pointer<Number>(scratch[2]) + thread * ATTENTION_BLOCK * rows,
                                       pointer<float>(scratch[3]) +
                                           thread * (2 + job.slots) * job.unit_tiles() * job.record()};
    };
    const auto nothing = [](const AttentionUnit&, int64_t) {};
    const AttentionShare share{attention_units(job, nothing), std::min<int64_t>(team.size, job.threads)};
    if (team.rank < share.threads) {
        AttentionWorker<Engine> worker = worker_of(team.rank);
        const int64_t begin = share.begin(team.rank), end = share.begin(team.rank + 1);
        Engine::begin();
        attention_units(job, [&](const AttentionUnit& unit, int64_t position) {
            worker.work(unit, position, begin, end);
        });
        Engine::end();
    }
    if (share.threads == 1) return;
    team.sync();
    attention_units(job, [&](const AttentionUnit& unit, int64_t position) {
        attention_join<Engine>(job, unit, position, share, worker_of, team);
    });
}

inline AttentionRows attention_rows(const Word* a, int64_t size) {
    return {pointer<const char>(a[0]), a[1] * size, a[2] * size, a[3] * size, pointer<const int32_t>(a[4]), a[5], a[6]};
}

// q, its token stride, its head stride (elements), its type, out (contiguous), starts [B + 1] int32, B, H, G, K, V,
// scale, lengths [B] int32, type of rows (PACKED_ROWS: strides in bytes, values as keys); of keys and
// then of values: pool, page stride, row stride, head stride
// (elements), table int32, its width, page size; threads that scratch is for, slots, rows of a unit (in 16s, at most
// 1024), and scratch, all as float32 (K', V': rounded up to 32): queries [threads, rows, K'], keys [threads, 128, K'],
// weights [threads, rows, 128], sums [threads, 2 + slots, rows / 16, 32 + 16 V']; of packed rows: numbers packed, exact
inline void attention(const Word* a, const Team& team) {
    const int64_t size = a[13] == PACKED_ROWS ? 1 : a[13] == BFLOAT16 ? 2 : 4;
    const AttentionJob job{pointer<const char>(a[0]), a[1], a[2], static_cast<int>(a[3]), pointer<char>(a[4]),
                           pointer<const int32_t>(a[5]), a[6], a[7], a[8], a[9], a[10], real(a[11]),
                           pointer<const int32_t>(a[12]), static_cast<int>(a[13]), attention_rows(a + 14, size),
                           attention_rows(a + 21, size), a[28], a[29], a[30], {a[35], a[36]}};
#if defined(__AVX512BF16__)
    if (job.query_type == BFLOAT16 && (job.row_type == BFLOAT16 || job.is_packed()))
        return attend<DotEngine>(job, a + 31, team);
#endif
    attend<WideEngine>(job, a + 31, team);
}

#define DAEDAL_ATTENTION_KERNELS {"attention", attention},
