// The fuzzer of sparse attention. An input is a header (shapes, levels, windows) and actions of four bytes: steps of a model's request, with
// states that are right, wrong, old or empty. After each step that should work, every kernel must give what naive attention in double
// precision gives over tokens that were pruned by format.md's rule, written here anew; all kernels the same bits.
//
//     header   head_dim, heads, group, k level, v level, kind, sink, recent, pack from   one byte each
//     action   what, tokens, beams and mask, seed
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../../../ov_ext/cpu_plugin/sparse_attention/attention.hpp"
#include "../../../ov_ext/cpu_plugin/sparse_attention/handles.hpp"
#include "../../../ov_ext/cpu_plugin/sparse_attention/packing.hpp"
#include "../../../ov_ext/cpu_plugin/support/isa_selection.hpp"
#include "../../../ov_ext/cpu_plugin/support/parallel.hpp"
#include "guarded.hpp"
#include "harness.hpp"

namespace {

using namespace ov_ext;
using namespace ov_ext::sparse_attention;

constexpr size_t header_bytes = 9, action_bytes = 4;
constexpr uint64_t most_tokens = 400, most_sequences = 3;
constexpr double levels[] = {0.5, 0.0, 0.9, 0.3, 0.7};

float some_float(Random& random, bool special) {
    if (special && random.one_in(300)) {
        constexpr float values[] = {INFINITY, -INFINITY, NAN, 1e38f, 1e-40f, 0.0f, -0.0f};
        return values[random.below(7)];
    }
    return float(int64_t(random.next() >> 40) - (1 << 23)) / float(1 << 22);  // -2 ... 2
}

// One token of one head as it is kept: format.md's rule, element by element.
std::vector<float> kept(const float* x, uint64_t dim, double level, bool int4) {
    std::vector<uint32_t> magnitude(dim), order(dim);
    float peak = 0;
    bool finite = true;
    for (uint64_t i = 0; i < dim; i++) {
        std::memcpy(&magnitude[i], x + i, 4);
        magnitude[i] = magnitude[i] >> 16 & 0x7FFF;
        order[i] = uint32_t(i);
        peak = std::max(peak, std::fabs(x[i]));
        finite &= std::isfinite(x[i]);
    }
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return magnitude[a] > magnitude[b]; });
    order.resize(dim - uint64_t(std::floor(double(dim) * level)));
    std::vector<float> result(dim, 0.0f);
    const float most = int4 ? 8 : 127;
    for (const uint32_t i : order) {
        const float scaled = x[i] * (most / peak), code = std::nearbyint(scaled);
        if (!finite)
            result[i] = NAN;
        else if (peak >= 0x1p-120f)
            result[i] = (int4 && code == 0 ? (scaled >= 0 ? 1.0f : -1.0f) : code) * (peak / most);
    }
    return result;
}

struct Tokens {  // keys or values of one sequence: of each head [tokens, dim], as they were and as they are kept
    std::vector<std::vector<float>> raw, kept;
};

// What a request has been told, and the state that goes with it.
struct Told {
    std::vector<Tokens> k, v;  // of each sequence
    int32_t handle[handle_words] = {};
    uint64_t tokens = 0;
};

struct Plan {
    Settings settings;
    uint64_t group;
    double k_level, v_level;

    explicit Plan(const uint8_t* bytes) {
        constexpr uint64_t dims[] = {32, 16, 48, 64, 80, 128, 96, 256};
        const uint64_t dim = dims[bytes[0] % 8];
        k_level = levels[bytes[3] % 5], v_level = levels[bytes[4] % 5];
        settings = {{dim, kept_of(dim, k_level), kept_of(dim, v_level), (bytes[5] & 1) != 0},
                    1 + bytes[1] % 3u,
                    bytes[6] % 6u,
                    bytes[7] % 100u,
                    40u * (bytes[8] % 8u)};
        group = 1 + bytes[2] % 5u;
    }
};

const std::vector<InstructionSet>& kernels() {
    static const auto all = available_instruction_sets();
    return all;
}

// Naive attention of one row; returns the largest magnitude of a value, and the error of a score that 16 bits of q explain, for a bound.
struct Naive {
    std::vector<double> y;
    double most_v = 0, score_error = 0;
    bool finite = true;
};

Naive naive(const Plan& plan, const Told& told, uint64_t b, uint64_t head, const float* q, const float* new_k, const float* new_v,
            uint64_t count, uint64_t visible, float scale, const float* mask) {
    const uint64_t dim = plan.settings.shape.head_dim, past = told.tokens, sink = plan.settings.sink, recent = plan.settings.recent;
    const uint64_t behind = past > sink && past >= plan.settings.pack_from ? past - sink : 0,
                   packed = behind > recent ? (behind - recent) / block_tokens * block_tokens : 0;
    double most_q = 0;
    for (uint64_t d = 0; d < dim; d++)
        most_q = std::max(most_q, double(std::fabs(q[d])));
    std::vector<double> scores;
    std::vector<const float*> values;
    Naive result;
    for (uint64_t t = 0; t < past + count; t++) {
        const bool pruned = t >= sink && t < sink + packed;
        const auto at = [&](const Tokens& of, const float* fresh) {
            return t < past ? (pruned ? of.kept : of.raw)[head].data() + t * dim : fresh + (t - past) * dim;
        };
        const float *key = at(told.k[b], new_k), *value = at(told.v[b], new_v);
        for (uint64_t d = 0; d < dim; d++)  // what no row may see is NaN times 0 all the same
            result.finite &= std::isfinite(value[d]) && std::isfinite(key[d]) && std::isfinite(q[d]);
        if (t >= visible)
            continue;
        double dot = 0, sum = 0;
        for (uint64_t d = 0; d < dim; d++) {
            dot += double(key[d]) * q[d];
            sum += std::fabs(key[d]);
            result.most_v = std::max(result.most_v, double(std::fabs(value[d])));
        }
        result.score_error = std::max(result.score_error, std::fabs(scale) * sum * most_q * (1 / 65000.0 + double(dim) * 0x1p-23));
        scores.push_back(dot * scale + (mask ? mask[t] : 0));
        values.push_back(value);
    }
    result.y.assign(dim, 0);
    const double most = scores.empty() ? -INFINITY : *std::max_element(scores.begin(), scores.end());
    if (most == -INFINITY)
        return result;
    double total = 0;
    for (uint64_t t = 0; t < scores.size(); t++) {
        const double weight = std::exp(scores[t] - most);
        total += weight;
        for (uint64_t d = 0; d < dim; d++)
            result.y[d] += weight * values[t][d];
    }
    for (double& y : result.y)
        y /= total;
    return result;
}

struct Inputs {
    uint64_t batch, count, q_heads;
    Guarded q, k, v, y, mask;
    Mask view;
    bool causal;

    uint64_t bytes(const Plan& plan, uint64_t heads) const { return batch * heads * count * plan.settings.shape.head_dim * 4; }
    Inputs(const Plan& plan, uint64_t batch, uint64_t count, uint64_t past, uint8_t what, Random& random)
        : batch(batch),
          count(count),
          q_heads(plan.settings.heads * plan.group),
          q(bytes(plan, q_heads), 0),
          k(bytes(plan, plan.settings.heads), 0),
          v(bytes(plan, plan.settings.heads), 0),
          y(bytes(plan, q_heads), 0),
          mask(what & 1 ? (what & 2 ? batch : 1) * (what & 4 ? count : 1) * (past + count) * 4 : 0, 0),
          causal(!(what & 1) || what & 8) {
        const auto fill = [&](const Guarded& memory, uint64_t size, bool special) {
            for (uint64_t i = 0; i < size / 4; i++)
                reinterpret_cast<float*>(memory.data)[i] = some_float(random, special);
        };
        fill(q, bytes(plan, q_heads), what & 16);
        fill(k, bytes(plan, plan.settings.heads), what & 32);
        fill(v, bytes(plan, plan.settings.heads), what & 64);
        if (!(what & 1))
            return;
        view = {reinterpret_cast<float*>(mask.data), what & 2 ? batch : 1, what & 4 ? count : 1, past + count};
        auto* to = reinterpret_cast<float*>(mask.data);
        for (uint64_t row = 0; row < view.batch * view.queries; row++) {
            const uint64_t hidden = random.one_in(4) ? view.columns : random.below(view.columns);  // padding on the left, or an empty row
            for (uint64_t t = 0; t < view.columns; t++)
                *to++ = t < hidden ? (random.one_in(2) ? -65504.0f : -INFINITY) : random.one_in(8) ? some_float(random, false) : 0.0f;
        }
    }
};

void check_attention(const Plan& plan, const Told& told, const Cache& cache, Inputs& in, Random& random) {
    const uint64_t dim = plan.settings.shape.head_dim, size = in.batch * in.q_heads * in.count * dim, heads = plan.settings.heads;
    const auto *q = reinterpret_cast<float*>(in.q.data), *k = reinterpret_cast<float*>(in.k.data);
    const auto* v = reinterpret_cast<float*>(in.v.data);
    auto* y = reinterpret_cast<float*>(in.y.data);
    const float scale = 1.0f / std::sqrt(float(dim));
    std::vector<float> first;
    for (const InstructionSet isa : kernels()) {
        std::fill_n(y, size, NAN);
        with_threads(1 + int(random.below(3)),
                     [&] { attend(cache, select_kernel(isa), {q, k, v, in.q_heads, in.count, scale, in.causal}, in.view, y); });
        if (first.empty())
            first.assign(y, y + size);
        for (uint64_t i = 0; i < size; i++)  // NaN may have any bits
            expect(!std::memcmp(&first[i], y + i, 4) || (std::isnan(first[i]) && std::isnan(y[i])),
                   std::string(name_of(isa)) + " gives other bits");
    }
    for (int sample = 0; sample < 4; sample++) {
        const uint64_t b = random.below(in.batch), head = random.below(in.q_heads), token = random.below(in.count);
        const uint64_t kv = head / plan.group, at = ((b * in.q_heads + head) * in.count + token) * dim;
        const float* mask = nullptr;
        if (in.view.data)
            mask = in.view.data + ((in.view.batch == 1 ? 0 : b) * in.view.queries + (in.view.queries == 1 ? 0 : token)) * in.view.columns;
        const uint64_t from = (b * heads + kv) * in.count * dim;
        const uint64_t visible = told.tokens + (in.causal ? token + 1 : in.count);
        const Naive expected = naive(plan, told, b, kv, q + at, k + from, v + from, in.count, visible, scale, mask);
        if (!expected.finite || expected.most_v > 1e30 || expected.score_error > 1)
            continue;
        // Each of a block's 64 weights is off by half of a 2^-15 step of the largest, which is part of the sum that they are divided by.
        const double bound = expected.most_v * (2 * std::expm1(expected.score_error) + 0x1p-10) + 1e-35;
        for (uint64_t d = 0; d < dim; d++)
            if (!(std::fabs(double(first[at + d]) - expected.y[d]) <= bound))
                found("attention is " + std::to_string(first[at + d]) + ", not " + std::to_string(expected.y[d]) + " within " +
                      std::to_string(bound));
    }
}

void tell(const Plan& plan, Told& told, const Inputs& in) {
    const uint64_t dim = plan.settings.shape.head_dim, heads = plan.settings.heads;
    for (uint64_t b = 0; b < in.batch; b++)
        for (uint64_t head = 0; head < heads; head++)
            for (const bool is_v : {false, true}) {
                const auto* from = reinterpret_cast<const float*>((is_v ? in.v : in.k).data) + (b * heads + head) * in.count * dim;
                Tokens& to = (is_v ? told.v : told.k)[b];
                to.raw[head].insert(to.raw[head].end(), from, from + in.count * dim);
                for (uint64_t t = 0; t < in.count; t++) {
                    const auto one = kept(from + t * dim, dim, is_v ? plan.v_level : plan.k_level, plan.settings.shape.int4);
                    to.kept[head].insert(to.kept[head].end(), one.begin(), one.end());
                }
            }
    told.tokens += in.count;
}

// Whether a step with this state is refused, and for a reason that says what to do.
bool refused(Caches& caches, const int32_t* handle, const void* address, const Settings& settings) {
    try {
        Caches::Step step(caches, handle, address, settings);
    } catch (const std::invalid_argument& error) {
        expect(std::string(error.what()).find("reset_state()") != std::string::npos, "a refusal that does not help");
        return true;
    }
    return false;
}

}  // namespace

bool check(const uint8_t* input, size_t size) {
    if (size < header_bytes + action_bytes)
        return false;
    const Plan plan(input);
    const std::vector<std::vector<float>> of_heads(plan.settings.heads);
    const Tokens nothing{of_heads, of_heads};
    Caches caches;
    Told told;
    int32_t state[handle_words] = {};  // the memory that OpenVINO keeps a state in
    for (size_t at = header_bytes; at + action_bytes <= size; at += action_bytes) {
        const uint8_t *action = input + at, what = action[0] % 8;
        Random random{action[3] + 256u * action[1] + 65536u * action[2]};
        std::memcpy(state, told.handle, sizeof(state));
        if (what == 0 && !told.k.empty()) {  // damaged: every single word of it counts
            state[random.below(handle_words)] ^= 1 << random.below(31);
            expect(refused(caches, state, state, plan.settings), "a damaged state is accepted");
            continue;
        }
        if (what == 1) {  // reset: the old cache is of no use any more
            std::memset(state, 0, sizeof(state));
            told = Told();
            Caches::Step step(caches, state, state, plan.settings);
            step.cache().reorder(nullptr, 1);
            step.commit(told.handle);
            expect(caches.count() == 1, "the cache before a reset was not dropped");
            told.k = told.v = {nothing};
            continue;
        }
        if (what == 2 && !told.k.empty()) {  // a step that fails: its cache is gone, and the state with it
            {
                Caches::Step step(caches, state, state, plan.settings);
            }
            expect(refused(caches, state, state, plan.settings), "a step that failed left its cache");
            expect(caches.count() == 0, "a step that failed left memory");
            told = Told();
            continue;
        }
        constexpr uint64_t counts[] = {1, 1, 1, 2, 7, 63, 64, 65, 130, 200};
        const uint64_t count = counts[action[1] % 10];
        if (told.tokens + count > most_tokens)
            continue;
        const uint64_t before = told.k.size(), batch = before && action[2] & 128 ? before : 1 + random.below(most_sequences);
        std::vector<int32_t> beams(batch);
        for (uint64_t b = 0; b < batch; b++)
            beams[b] = !before ? 0 : action[2] & 128 ? int32_t(b) : int32_t(random.below(before));
        Caches::Step step(caches, state, state, plan.settings);
        expect(!before || refused(caches, state, state, plan.settings), "two requests use one cache");
        Cache& cache = step.cache();
        if (before && what == 3) {  // a beam that does not exist
            beams[random.below(batch)] = random.one_in(2) ? -1 : int32_t(before);
            bool thrown = false;
            try {
                cache.reorder(beams.data(), batch);
            } catch (const std::invalid_argument&) {
                thrown = true;
            }
            expect(thrown, "a beam that does not exist is accepted");
            told = Told();  // the step ends without a commit
            continue;
        }
        cache.reorder(beams.data(), batch);
        Told next;
        next.tokens = told.tokens;
        for (uint64_t b = 0; b < batch; b++) {
            next.k.push_back(before ? told.k[size_t(beams[b])] : nothing);
            next.v.push_back(before ? told.v[size_t(beams[b])] : nothing);
        }
        told = std::move(next);
        Inputs in(plan, batch, count, told.tokens, action[2], random);
        expect(cache.tokens() == told.tokens, "the cache has another number of tokens");
        constexpr uint64_t work = 1 << 21;  // multiplications, so that an input takes milliseconds
        if (batch * in.q_heads * count * (told.tokens + count) * plan.settings.shape.head_dim < work)
            check_attention(plan, told, cache, in, random);
        with_threads(1 + int(random.below(2)),
                     [&] { cache.append(reinterpret_cast<float*>(in.k.data), reinterpret_cast<float*>(in.v.data), count); });
        tell(plan, told, in);
        step.commit(told.handle);
    }
    return told.tokens > 0;
}

std::vector<std::vector<uint8_t>> seeds() {
    std::vector<std::vector<uint8_t>> result;
    for (uint8_t i = 0; i < 20; i++) {
        Random random{i};
        std::vector<uint8_t> input{
            i, uint8_t(i / 2), i, uint8_t(i % 5), uint8_t(i / 5), uint8_t(i / 3), uint8_t(i % 7), uint8_t(11 * i), uint8_t(i / 2)};
        for (const uint8_t count : {8, 0, 8, 4, 0, 9, 5, 0, 0, 6, 7, 0})
            for (const auto byte : {uint8_t(4), count, uint8_t(random.next()), uint8_t(random.next())})
                input.push_back(byte);
        result.push_back(std::move(input));
    }
    return result;
}

void mutate(std::vector<uint8_t>& input, Random& random) {
    input.resize(std::max(input.size(), header_bytes + action_bytes));
    for (uint64_t changes = 1 + random.below(4); changes; changes--) {
        const uint64_t actions = (input.size() - header_bytes) / action_bytes;
        const auto action = input.begin() + long(header_bytes + action_bytes * random.below(actions));
        switch (random.below(4)) {
            case 0: input[random.below(header_bytes)] = uint8_t(random.next()); break;
            case 1: action[long(random.below(action_bytes))] = uint8_t(random.next()); break;
            case 2:
                if (actions < 24) {
                    const uint8_t more[] = {uint8_t(random.next()), uint8_t(random.next()), uint8_t(random.next()), uint8_t(random.next())};
                    input.insert(action, more, more + action_bytes);
                }
                break;
            default:
                if (actions > 1)
                    input.erase(action, action + action_bytes);
        }
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {  // for the fuzzing engines
    check(data, size);
    return 0;
}
