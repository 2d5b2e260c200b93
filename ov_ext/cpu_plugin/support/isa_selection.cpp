#include "isa_selection.hpp"

#include <cstdlib>

#include "cpu_features.hpp"

namespace ov_ext {
namespace {

// clang-format off
constexpr struct {
    InstructionSet isa;
    const char* name;
} names[] = {  // best first
    {InstructionSet::amx, "amx"},
    {InstructionSet::avx512_bf16, "avx512_bf16"},
    {InstructionSet::avx512, "avx512"},
    {InstructionSet::avx512_core_vnni, "avx512_core_vnni"},
    {InstructionSet::avx512_core, "avx512_core"},
    {InstructionSet::avx2_vnni, "avx2_vnni"},
    {InstructionSet::avx2, "avx2"},
    {InstructionSet::reference, "reference"},
};
// clang-format on

}  // namespace

const char* name_of(InstructionSet isa) {
    for (const auto& entry : names)
        if (entry.isa == isa)
            return entry.name;
    return "";
}

bool can_run(InstructionSet isa) {
    const CpuFeatures& f = cpu_features();
    const bool avx512 = f.avx512 && f.avx512_vbmi2 && f.avx512_vnni && f.gfni;
    switch (isa) {
        case InstructionSet::reference: return true;
        case InstructionSet::avx2: return f.avx2;
        case InstructionSet::avx2_vnni: return f.avx_vnni;
        case InstructionSet::avx512_core: return f.avx512;
        case InstructionSet::avx512_core_vnni: return f.avx512 && f.avx512_vnni;
        case InstructionSet::avx512: return avx512;
        case InstructionSet::avx512_bf16: return avx512 && f.avx512_bf16;
        case InstructionSet::amx: return avx512 && f.amx_tile && f.amx_bf16 && f.amx_int8 && amx_permission();
    }
    return false;
}

std::vector<InstructionSet> available_instruction_sets() {
    std::vector<InstructionSet> result;
    for (const auto& entry : names)
        if (can_run(entry.isa))
            result.push_back(entry.isa);
    return result;
}

InstructionSet instruction_set_by_name(const std::string& name) {
    std::string known;
    for (const InstructionSet isa : available_instruction_sets()) {
        if (name == name_of(isa))
            return isa;
        known += (known.empty() ? "" : ", ") + std::string(name_of(isa));
    }
    throw UnavailableInstructionSet("kernel '" + name + "' (OV_EXT_ISA) is not available on this CPU: " + known + " are");
}

const char* requested_name() {
    const char* name = std::getenv("OV_EXT_ISA");
    return name && *name ? name : nullptr;
}

std::optional<InstructionSet> requested_instruction_set() {
    static const std::optional<InstructionSet> requested = []() -> std::optional<InstructionSet> {
        if (const char* name = requested_name())
            return instruction_set_by_name(name);
        return std::nullopt;
    }();
    return requested;
}

}  // namespace ov_ext
