// Convolution, pooling and response normalisation of oneDNN 2.5 on activations that stay in its
// blocked layout [N][C/block][H][W][block]. See knl/models/onednn.py.
//
// Weights and their gradients are plain ([O][I][H][W], with groups in O), so that checkpoints, LARS
// and gradient sync know nothing of a layout. A convolution packs its weights into a buffer that it
// shares with all others: the reorder costs one pass over the weights, and the buffer stays in cache.
//
// knl.models.onednn loads the library first, from where pip has put it.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"

#define KNL_API extern "C" __attribute__((visibility("default")))

namespace {

using dnnl::memory;
using Tag = memory::format_tag;
using Dims = memory::dims;
using Kind = dnnl::prop_kind;

enum Pass { kInference, kForward, kBackwardData, kBackwardWeights };

// One window operation; filled in by knl.models.onednn, field by field.
struct Shape {
    int64_t samples, in_channels, in_height, in_width;
    int64_t out_channels, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_height, stride_width;
    int64_t pad_height, pad_width, dilation_height, dilation_width;
    int64_t groups;
    int64_t in_block, out_block;  // 1 for a plain tensor, [N][C][H][W]
    int64_t bias, relu;           // whether a convolution has them
};

// What one argument of a call is for oneDNN.
struct Slot {
    int argument;
    memory::desc given;   // of the caller's memory
    memory::desc wanted;  // of the primitive; differs for weights alone
};

struct Operation {
    dnnl::primitive primitive;
    std::string implementation;
    std::vector<Slot> slots;  // in the order of the pointers of a call
    std::vector<dnnl::primitive> reorders;  // of the slots; empty where none is needed
};

dnnl::engine& engine() {
    static dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
    return cpu;
}

Tag activations(int64_t block) {
    switch (block) {
        case 1: return Tag::nchw;
        case 8: return Tag::nChw8c;
        case 16: return Tag::nChw16c;
    }
    throw std::runtime_error("activations come in blocks of 1, 8 or 16 channels");
}

memory::desc described(const Dims& dims, Tag tag) {
    return memory::desc(dims, memory::data_type::f32, tag);
}

// The memory of packed weights: grows to the largest layer's.
void* packed_buffer(size_t bytes) {
    static thread_local std::unique_ptr<float, void (*)(void*)> buffer(nullptr, std::free);
    static thread_local size_t size = 0;
    if (bytes > size) {
        size = (bytes + 4095) / 4096 * 4096;
        buffer.reset(static_cast<float*>(std::aligned_alloc(4096, size)));
        if (!buffer) throw std::bad_alloc();
    }
    return buffer.get();
}

void add(Operation& op, int argument, const memory::desc& given, const memory::desc& wanted,
         bool is_output) {
    op.slots.push_back({argument, given, wanted});
    op.reorders.emplace_back();
    if (given == wanted) return;
    const memory from(is_output ? wanted : given, engine(), nullptr);
    const memory to(is_output ? given : wanted, engine(), nullptr);
    op.reorders.back() = dnnl::reorder(from, to);
}

template <typename Description>
void finish(Operation& op, const Description& description) {
    op.primitive = dnnl::primitive(description);
    op.implementation = description.impl_info_str();
}

dnnl::primitive_attr attributes(const Shape& s) {
    dnnl::primitive_attr found;
    if (s.relu) {
        dnnl::post_ops after;
        after.append_eltwise(1.0f, dnnl::algorithm::eltwise_relu, 0.0f, 0.0f);
        found.set_post_ops(after);
    }
    return found;
}

void convolution(Operation& op, const Shape& s, Pass pass) {
    const Dims strides{s.stride_height, s.stride_width}, pads{s.pad_height, s.pad_width};
    const Dims dilates{s.dilation_height - 1, s.dilation_width - 1};
    const int64_t g = s.groups, in = s.in_channels, out = s.out_channels;
    const auto source = described({s.samples, in, s.in_height, s.in_width}, activations(s.in_block));
    const auto target =
        described({s.samples, out, s.out_height, s.out_width}, activations(s.out_block));
    Dims kernel{out, in, s.kernel_height, s.kernel_width};
    if (g > 1) kernel = {g, out / g, in / g, s.kernel_height, s.kernel_width};
    const auto plain = described(kernel, g > 1 ? Tag::goihw : Tag::oihw);
    const auto weights = described(kernel, Tag::any);
    const auto bias = s.bias ? described({out}, Tag::a) : memory::desc();
    const auto how = dnnl::algorithm::convolution_direct;
    const auto kind = pass == kInference ? Kind::forward_inference : Kind::forward_training;
    const dnnl::convolution_forward::primitive_desc forward(
        {kind, how, source, weights, bias, target, strides, dilates, pads, pads}, attributes(s),
        engine());
    if (pass == kInference || pass == kForward) {
        add(op, DNNL_ARG_SRC, source, source, false);
        add(op, DNNL_ARG_WEIGHTS, plain, forward.weights_desc(), false);
        if (s.bias) add(op, DNNL_ARG_BIAS, bias, bias, false);
        add(op, DNNL_ARG_DST, target, target, true);
        finish(op, forward);
    } else if (pass == kBackwardData) {
        const dnnl::convolution_backward_data::primitive_desc backward(
            {how, source, weights, target, strides, dilates, pads, pads}, engine(), forward);
        add(op, DNNL_ARG_DIFF_DST, target, target, false);
        add(op, DNNL_ARG_WEIGHTS, plain, backward.weights_desc(), false);
        add(op, DNNL_ARG_DIFF_SRC, source, source, true);
        finish(op, backward);
    } else {
        const dnnl::convolution_backward_weights::primitive_desc backward(
            {how, source, weights, bias, target, strides, dilates, pads, pads}, engine(), forward);
        add(op, DNNL_ARG_SRC, source, source, false);
        add(op, DNNL_ARG_DIFF_DST, target, target, false);
        add(op, DNNL_ARG_DIFF_WEIGHTS, plain, backward.diff_weights_desc(), true);
        if (s.bias) add(op, DNNL_ARG_DIFF_BIAS, bias, bias, true);
        finish(op, backward);
    }
}

void max_pooling(Operation& op, const Shape& s, Pass pass) {
    const Dims strides{s.stride_height, s.stride_width}, pads{s.pad_height, s.pad_width};
    const Dims kernel{s.kernel_height, s.kernel_width};
    // Windows that begin in the padding at the end are not torch's, so none is added there.
    const auto least = [](int64_t out, int64_t stride, int64_t kernel, int64_t in, int64_t pad) {
        return std::max<int64_t>(0, (out - 1) * stride + kernel - in - pad);
    };
    const Dims ends{least(s.out_height, s.stride_height, s.kernel_height, s.in_height, s.pad_height),
                    least(s.out_width, s.stride_width, s.kernel_width, s.in_width, s.pad_width)};
    const auto source = described({s.samples, s.in_channels, s.in_height, s.in_width},
                                  activations(s.in_block));
    const auto target = described({s.samples, s.out_channels, s.out_height, s.out_width},
                                  activations(s.out_block));
    const auto how = dnnl::algorithm::pooling_max;
    const auto kind = pass == kInference ? Kind::forward_inference : Kind::forward_training;
    const dnnl::pooling_forward::primitive_desc forward(
        {kind, how, source, target, strides, kernel, pads, ends}, engine());
    const auto places = forward.workspace_desc();
    if (pass == kBackwardData) {
        const dnnl::pooling_backward::primitive_desc backward(
            {how, source, target, strides, kernel, pads, ends}, engine(), forward);
        add(op, DNNL_ARG_DIFF_DST, target, target, false);
        add(op, DNNL_ARG_WORKSPACE, places, places, false);
        add(op, DNNL_ARG_DIFF_SRC, source, source, true);
        finish(op, backward);
        return;
    }
    add(op, DNNL_ARG_SRC, source, source, false);
    add(op, DNNL_ARG_DST, target, target, true);
    if (pass == kForward) add(op, DNNL_ARG_WORKSPACE, places, places, true);
    finish(op, forward);
}

// Across channels, as torch's LocalResponseNorm.
void response_norm(Operation& op, const Shape& s, Pass pass, int64_t size, float alpha, float beta,
                   float k) {
    const auto data = described({s.samples, s.in_channels, s.in_height, s.in_width},
                                activations(s.in_block));
    const auto how = dnnl::algorithm::lrn_across_channels;
    const auto kind = pass == kInference ? Kind::forward_inference : Kind::forward_training;
    const dnnl::lrn_forward::primitive_desc forward({kind, how, data, size, alpha, beta, k},
                                                    engine());
    const auto kept = forward.workspace_desc();
    add(op, DNNL_ARG_SRC, data, data, false);
    if (pass == kBackwardData) {
        const dnnl::lrn_backward::primitive_desc backward({how, data, data, size, alpha, beta, k},
                                                          engine(), forward);
        add(op, DNNL_ARG_DIFF_DST, data, data, false);
        add(op, DNNL_ARG_WORKSPACE, kept, kept, false);
        add(op, DNNL_ARG_DIFF_SRC, data, data, true);
        finish(op, backward);
        return;
    }
    add(op, DNNL_ARG_DST, data, data, true);
    if (pass == kForward) add(op, DNNL_ARG_WORKSPACE, kept, kept, true);
    finish(op, forward);
}

template <typename Make>
void make(Operation** made, const Make& fill) {
    auto op = std::make_unique<Operation>();
    fill(*op);
    *made = op.release();
}

template <typename Work>
const char* guarded(const Work& work) {
    static thread_local std::string message;
    try {
        work();
        return nullptr;
    } catch (const dnnl::error& error) {
        message = error.message;
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}

}  // namespace

// All that can fail returns null or the reason.

KNL_API void knl_onednn_version(int* version) {
    const dnnl_version_t* found = dnnl_version();
    version[0] = found->major, version[1] = found->minor, version[2] = found->patch;
}

// The instruction set that oneDNN sees, as in dnnl_cpu_isa_t.
KNL_API int knl_onednn_isa() { return static_cast<int>(dnnl_get_effective_cpu_isa()); }

KNL_API const char* knl_onednn_convolution(const Shape* shape, int pass, Operation** made) {
    return guarded([&] {
        make(made, [&](Operation& op) { convolution(op, *shape, static_cast<Pass>(pass)); });
    });
}

KNL_API const char* knl_onednn_max_pooling(const Shape* shape, int pass, Operation** made) {
    return guarded([&] {
        make(made, [&](Operation& op) { max_pooling(op, *shape, static_cast<Pass>(pass)); });
    });
}

KNL_API const char* knl_onednn_response_norm(const Shape* shape, int pass, int64_t size,
                                             double alpha, double beta, double k,
                                             Operation** made) {
    return guarded([&] {
        make(made, [&](Operation& op) {
            response_norm(op, *shape, static_cast<Pass>(pass), size, static_cast<float>(alpha),
                          static_cast<float>(beta), static_cast<float>(k));
        });
    });
}

KNL_API const char* knl_onednn_implementation(const Operation* op) {
    return op->implementation.c_str();
}

// Bytes of the caller's memory for an argument, by its place in a call.
KNL_API int64_t knl_onednn_bytes(const Operation* op, int place) {
    return static_cast<int64_t>(op->slots[place].given.get_size());
}

KNL_API const char* knl_onednn_run(const Operation* op, void* const* pointers) {
    return guarded([&] {
        static thread_local dnnl::stream stream(engine());
        std::unordered_map<int, memory> arguments;
        for (size_t n = 0; n < op->slots.size(); ++n) {
            const Slot& slot = op->slots[n];
            void* at = pointers[n];
            const bool packs = static_cast<bool>(op->reorders[n]);
            if (packs) at = packed_buffer(slot.wanted.get_size());
            const memory used(slot.wanted, engine(), at);
            arguments.emplace(slot.argument, used);
            const memory plain(slot.given, engine(), pointers[n]);
            if (packs && slot.argument == DNNL_ARG_WEIGHTS)
                op->reorders[n].execute(stream, {{DNNL_ARG_FROM, plain}, {DNNL_ARG_TO, used}});
        }
        op->primitive.execute(stream, arguments);
        for (size_t n = 0; n < op->slots.size(); ++n) {
            const Slot& slot = op->slots[n];
            if (!op->reorders[n] || slot.argument != DNNL_ARG_DIFF_WEIGHTS) continue;
            const memory plain(slot.given, engine(), pointers[n]);
            op->reorders[n].execute(
                stream, {{DNNL_ARG_FROM, arguments.at(slot.argument)}, {DNNL_ARG_TO, plain}});
        }
        stream.wait();
    });
}
