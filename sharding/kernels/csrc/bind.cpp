// The Python module `_cpu`: addresses in, nothing out. sharding/kernels/cpu.py checks every shape.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block.h"
#include "ops.h"
#include "pool.h"

namespace nb = nanobind;
using namespace longspan;

namespace {

using Address = uintptr_t;
using Release = nb::call_guard<nb::gil_scoped_release>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

#if defined(__x86_64__)
// Whether the processor has tiles of bytes (AMX) and the system lets this process use them: their 8
// KiB a thread must be asked for.
bool multiplies_tiles() {
#if defined(__linux__)
    static const bool yes = [] {
        constexpr unsigned tiles = 1u << 24, bytes = 1u << 25;
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) == 0 || (d & bytes) == 0)
            return false;
        constexpr int request_permission = 0x1023, tile_data = 18;  // asm/prctl.h
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return yes;
#else
    return false;
#endif
}
#endif

// What this processor runs, fastest first.
std::vector<const Ops*> available() {
    std::vector<const Ops*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (__builtin_cpu_supports("avx512vnni")) {
            if (multiplies_tiles()) found.push_back(&avx512_amx_ops());
            found.push_back(&avx512_vnni_ops());
        }
        found.push_back(&AVX512_OPS);
    }
    if (avx2) found.push_back(&AVX2_OPS);
#endif
    found.push_back(&PORTABLE_OPS);
    return found;
}

const Ops& find(const std::string& name) {
    for (const Ops* ops : available())
        if (name == ops->name) return *ops;
    throw std::invalid_argument("this processor does not run " + name);
}

struct Kernels {
    const Ops& ops;
    explicit Kernels(const std::string& isa) : ops(find(isa)) {}
};

void check_order(const Ops& ops, const Weight& weight) {
    if (ops.packing.order != weight.order())
        throw std::invalid_argument("a weight that was packed for another instruction set");
}

void check_orders(const Ops& ops, const FeedForward& feed) {
    if (feed.router) check_order(ops, *feed.router);
    for (const auto* weights : {&feed.gate_up, &feed.down})
        for (const Weight* weight : *weights) check_order(ops, *weight);
}

void check_rotation(int rotation, const Batch& batch) {
    if (rotation < 0 || rotation >= batch.rotations())
        throw std::invalid_argument("no rotation " + std::to_string(rotation));
}

// The blocks of a stage.
struct Layers {
    const Ops& ops;
    std::vector<Layer> all;
    explicit Layers(const Kernels& kernels) : ops(kernels.ops) {}
};

// A stage's head.
struct BoundHead {
    const Ops& ops;
    Head head;
};

// A batch's segments: (first row, stop row, position) of each, one after the other, and the
// addresses of their page tables.
std::vector<Segment> make_segments(const std::vector<int>& spans,
                                   const std::vector<Address>& tables) {
    std::vector<Segment> segments;
    for (size_t i = 0; i < tables.size(); ++i)
        segments.push_back({spans.at(3 * i), spans.at(3 * i + 1), spans.at(3 * i + 2),
                            at<const int64_t>(tables[i])});
    return segments;
}

Pages make_pages(int heads, int kv_heads, int dim, Address keys, Address values) {
    return {heads, kv_heads, dim, at<uint16_t>(keys), at<uint16_t>(values)};
}

void bind_kernels(nb::class_<Kernels> kernels) {
    kernels.def(nb::init<const std::string&>());
    kernels.def(
        "matmul",
        [](const Kernels& self, Address x, int tokens, const Weight& weight, Address residual,
           Address y) {
            check_order(self.ops, weight);
            matmul(self.ops, at<float>(x), tokens, weight, nullptr, at<float>(residual),
                   at<float>(y));
        },
        Release());
    kernels.def(
        "embed",
        [](const Kernels& self, const Weight& weight, const std::vector<int64_t>& ids, Address y) {
            check_order(self.ops, weight);
            for (const int64_t id : ids)
                if (id < 0 || id >= weight.rows())
                    throw std::out_of_range("a row outside [0, " + std::to_string(weight.rows()) +
                                            ")");
            embed(self.ops, weight, ids, at<float>(y));
        },
        Release());
    kernels.def(
        "rms_norm",
        [](const Kernels& self, Address x, int tokens, int width, Address scale, float eps,
           Address residual, Address y) {
            self.ops.rms_norm(at<float>(x), tokens, width, {at<float>(scale), eps},
                              at<float>(residual), at<float>(y));
        },
        Release());
    kernels.def(
        "gated",
        [](const Kernels& self, Address x, int tokens, int width, Activation activation,
           Address y) { self.ops.gated(at<float>(x), tokens, width, activation, at<float>(y)); },
        Release());
    kernels.def(
        "mix_experts",
        [](const Kernels& self, Address x, int tokens, const FeedForward& feed,
           Activation activation, Address residual, Address y) {
            check_orders(self.ops, feed);
            mix_experts(self.ops, feed, activation, at<float>(x), tokens, at<float>(residual),
                        at<float>(y));
        },
        Release());
    kernels.def(
        "rotate_and_store",
        [](const Kernels& self, Address qkv, const Heads& heads, int rotation, const Batch& batch,
           const Pages& pages, Address q) {
            check_rotation(rotation, batch);
            self.ops.rotate_and_store(at<float>(qkv), heads, batch.turn(rotation, 0), pages,
                                      at<float>(q));
        },
        Release());
    kernels.def(
        "attention",
        [](const Kernels& self, Address q, const Batch& batch, const Pages& pages, int window,
           Address y) {
            self.ops.attention(at<float>(q), batch.segments(0), pages, window, nullptr,
                               at<float>(y));
        },
        Release());
}

// Filters are temperature, top_k, top_p and min_p; penalties repetition, presence and frequency.
Recipe make_recipe(const std::vector<double>& filters, const std::vector<double>& penalties,
                   Address seen, Address counts) {
    Recipe how{};
    how.temperature = filters.at(0);
    how.top_k = static_cast<int64_t>(filters.at(1));
    how.top_p = filters.at(2);
    how.min_p = filters.at(3);
    how.repetition = penalties.at(0);
    how.presence = penalties.at(1);
    how.frequency = penalties.at(2);
    how.seen = at<const uint8_t>(seen);
    how.counts = at<const float>(counts);
    return how;
}

void bind_draws(nb::class_<Kernels>& kernels) {
    kernels.def(
        "draw",
        [](const Kernels& self, Address logits, int n, const std::vector<double>& filters,
           const std::vector<double>& penalties, Address seen, Address counts,
           std::vector<int64_t> biased, std::vector<double> bias, std::vector<int64_t> banned,
           uint64_t seed, uint64_t position) {
            Recipe how = make_recipe(filters, penalties, seen, counts);
            if (biased.size() != bias.size()) throw std::invalid_argument("a bias is missing");
            how.biased = std::move(biased);
            how.bias = std::move(bias);
            how.banned = std::move(banned);
            how.seed = seed;
            how.position = position;
            return self.ops.draw(at<const float>(logits), n, how);
        },
        Release());
    kernels.def(
        "score",
        [](const Kernels& self, Address logits, int n, int64_t token, int alternatives) {
            if (alternatives < 0) throw std::invalid_argument("alternatives");
            std::vector<Scored> scored(1 + static_cast<size_t>(std::min(alternatives, n)));
            const int found =
                self.ops.score(at<const float>(logits), n, token, alternatives, scored.data());
            std::vector<std::pair<int64_t, float>> out;
            for (int i = 0; i < found; ++i)
                out.emplace_back(scored[static_cast<size_t>(i)].id,
                                 scored[static_cast<size_t>(i)].logprob);
            return out;
        },
        Release());
}

void check_rotations(const std::vector<Layer>& layers, const Batch& batch) {
    for (const Layer& layer : layers) check_rotation(layer.rotation, batch);
}

void bind_layers(nb::class_<Layers> layers) {
    layers.def(nb::init<const Kernels&>());
    layers.def("append", [](Layers& self, std::vector<Address> norms, float eps, const Weight& qkv,
                            const Weight& output, const FeedForward& feed, const Pages& pages,
                            int window, const Heads& heads, int rotation, Activation activation) {
        for (const Weight* weight : {&qkv, &output}) check_order(self.ops, *weight);
        check_orders(self.ops, feed);
        const auto norm = [&](size_t i) { return Norm{at<float>(norms.at(i)), eps}; };
        self.all.push_back({norm(0), norm(1), &qkv, &output, feed, pages, window, norm(2),
                            norm(3), heads, rotation, activation});
    });
    layers.def(
        "run",
        [](const Layers& self, Address x, const Batch& batch, Address y) {
            check_rotations(self.all, batch);
            run_layers(self.ops, self.all, at<float>(x), batch, nullptr, at<float>(y));
        },
        Release());
    layers.def(
        "run_wanted",
        [](const Layers& self, Address x, const Batch& batch, const std::vector<int>& wanted,
           Address y) {
            check_rotations(self.all, batch);
            run_layers(self.ops, self.all, at<float>(x), batch, &wanted, at<float>(y));
        },
        Release());
}

void bind_head(nb::class_<BoundHead> head) {
    head.def("__init__", [](BoundHead* self, const Kernels& kernels, Address norm, float eps,
                            const Weight& weight) {
        check_order(kernels.ops, weight);
        new (self) BoundHead{kernels.ops, {{at<float>(norm), eps}, &weight}};
    });
    head.def(
        "logits",
        [](const BoundHead& self, Address x, int tokens, Address y) {
            run_head(self.ops, self.head, at<float>(x), tokens, at<float>(y));
        },
        Release());
    head.def(
        "likeliest",
        [](const BoundHead& self, Address x, int tokens) {
            return likeliest(self.ops, self.head, at<float>(x), tokens);
        },
        Release());
}

}  // namespace

NB_MODULE(_cpu, m) {
    nb::set_leak_warnings(false);  // a module-level object at exit is no leak
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Ops* ops : available()) names.emplace_back(ops->name);
        return names;
    });
    m.def("use_threads", &use_threads, Release());
    m.def("pairs_columns", &pairs_columns);
    m.def("pair_columns", &pair_columns);
    m.def("threads", [] { return pool().threads(); });
    m.def("keep_to", [](const std::vector<int>& cores) { pool().keep_to(cores); });
    nb::class_<Kernels> kernels(m, "Kernels");
    nb::class_<Weight>(m, "Weight")
        .def("__init__", [](Weight* self, int cols,
                            const Kernels& kernels) { new (self) Weight(cols, kernels.ops.packing); })
        .def(
            "append",
            [](Weight& self, int type, std::vector<int> rows, std::vector<Address> files,
               size_t row_bytes) {
                std::vector<Rows> tensors;
                for (size_t i = 0; i < rows.size(); ++i)
                    tensors.push_back({rows[i], at<const uint8_t>(files.at(i))});
                self.append(type, tensors, row_bytes);
            },
            Release())
        .def_prop_ro("rows", &Weight::rows)
        .def_prop_ro("cols", &Weight::cols)
        .def_prop_ro("n_bytes", &Weight::bytes);
    nb::class_<Pages>(m, "Pages")
        .def("__init__",
             [](Pages* self, int heads, int kv_heads, int dim, Address keys, Address values) {
                 new (self) Pages(make_pages(heads, kv_heads, dim, keys, values));
             });
    nb::class_<Heads>(m, "Heads")
        .def("__init__", [](Heads* self, Address bias, Address q_norm, Address k_norm, float eps) {
            new (self)
                Heads{at<float>(bias), {at<float>(q_norm), eps}, {at<float>(k_norm), eps}};
        });
    nb::class_<FeedForward>(m, "FeedForward")
        .def(
            "__init__",
            [](FeedForward* self, const Weight* router, const std::vector<const Weight*>& gate_up,
               const std::vector<const Weight*>& down, int used) {
                new (self) FeedForward{router, gate_up, down, used};
            },
            nb::arg("router").none(), nb::arg("gate_up"), nb::arg("down"), nb::arg("used"));
    nb::enum_<Activation>(m, "Activation")
        .value("silu", Activation::Silu)
        .value("gelu", Activation::Gelu);
    nb::class_<Batch>(m, "Batch")
        .def("__init__", [](Batch* self, const std::vector<int>& spans,
                            const std::vector<Address>& tables,
                            const std::vector<Address>& window_tables, Address frequencies,
                            const std::vector<double>& gains, int pairs, bool adjacent) {
            if (!window_tables.empty() && window_tables.size() != tables.size())
                throw std::invalid_argument("a page table is missing");
            std::vector<const int64_t*> windowed;
            for (const Address table : window_tables) windowed.push_back(at<const int64_t>(table));
            new (self) Batch(make_segments(spans, tables), windowed,
                             at<const double>(frequencies), gains, pairs, adjacent);
        });
    bind_layers(nb::class_<Layers>(m, "Layers"));
    bind_kernels(kernels);
    bind_draws(kernels);
    bind_head(nb::class_<BoundHead>(m, "Head"));
}
