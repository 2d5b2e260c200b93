// Which instruction sets may run: on this CPU and operating system, and by the wish of the user (environment variable OV_EXT_ISA).
#pragma once

#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction_set.hpp"

namespace ov_ext {

// A name, given in OV_EXT_ISA or by the caller, of no instruction set or of one that cannot run here. what() says which ones can.
struct UnavailableInstructionSet : std::runtime_error {
    using std::runtime_error::runtime_error;
};

const char* name_of(InstructionSet isa);

// For amx this asks the system for permission.
bool can_run(InstructionSet isa);

// Throws UnavailableInstructionSet.
InstructionSet instruction_set_by_name(const std::string& name);

// The value of OV_EXT_ISA, null when it is unset or empty.
const char* requested_name();
// The instruction set that it names, read once per process. Throws UnavailableInstructionSet, at every call.
std::optional<InstructionSet> requested_instruction_set();

std::vector<InstructionSet> available_instruction_sets();  // best first; the last one is reference

// Those of an operation's kernels, best first, that can run here. A kernel is anything with a member `isa`.
template <class Kernel, size_t count>
std::vector<const Kernel*> available_kernels(const Kernel* const (&all)[count]) {
    std::vector<const Kernel*> result;
    for (const Kernel* kernel : all)
        if (can_run(kernel->isa))
            result.push_back(kernel);
    return result;
}

}  // namespace ov_ext
