#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>

#include "sparse_activation/op.hpp"
#include "sparse_attention/op.hpp"
#include "sparse_matmul/op.hpp"

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<ov_ext::sparse_matmul::SparseMatMul>>(),
                                     std::make_shared<ov::OpExtension<ov_ext::sparse_activation::SparseActivationMatMul>>(),
                                     std::make_shared<ov::OpExtension<ov_ext::sparse_attention::SparseKVAttention>>()}));
