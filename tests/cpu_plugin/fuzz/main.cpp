// The fuzzer's own driver, for any C++ compiler: seeds and mutations in an order that depends on --seed alone.
//   fuzz --runs N [--seed S] [--save DIR]   N inputs; the one that ends the process is in DIR (default: here) as finding-S-NUMBER.bin
//   fuzz FILE...                            the inputs in these files
#include <fcntl.h>
#include <sanitizer/common_interface_defs.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "harness.hpp"

namespace {

std::vector<uint8_t> current;
std::string finding;

// Called when a sanitizer, abort() or the alarm ends the process: system calls only.
void save_finding() {
    const int file = finding.empty() ? -1 : open(finding.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (file < 0)
        return;
    if (write(file, current.data(), current.size()) == ssize_t(current.size()))
        (void)!write(2, "The input was saved.\n", 21);
    close(file);
}

void on_signal(int number) {
    save_finding();
    signal(number, SIG_DFL);
    raise(number);
}

bool run(const std::vector<uint8_t>& input) {
    constexpr unsigned patience = 60;  // seconds; an input takes milliseconds
    alarm(patience);
    return check(input.data(), input.size());
}

}  // namespace

int main(int count, char** arguments) {
    uint64_t runs = 0, seed = 1;
    std::string folder = ".";
    std::vector<std::string> files;
    for (int i = 1; i < count; i++) {
        const std::string argument = arguments[i];
        const char* value = i + 1 < count ? arguments[i + 1] : "0";
        if (argument == "--runs")
            runs = std::strtoull(value, nullptr, 10), i++;
        else if (argument == "--seed")
            seed = std::strtoull(value, nullptr, 10), i++;
        else if (argument == "--save")
            folder = value, i++;
        else
            files.push_back(argument);
    }
    for (const std::string& name : files) {
        std::ifstream file(name, std::ios::binary);
        run({std::istreambuf_iterator<char>(file), {}});
    }
    __sanitizer_set_death_callback(save_finding);
    for (int number : {SIGABRT, SIGALRM})
        signal(number, on_signal);

    Random random{seed};
    auto pool = seeds();
    for (const auto& input : pool)
        run(input);
    uint64_t valid = 0;
    for (uint64_t i = 0; i < runs; i++) {
        const uint64_t parent = random.below(pool.size());
        current = pool[parent];
        mutate(current, random);
        finding = folder + "/finding-" + std::to_string(seed) + "-" + std::to_string(i) + ".bin";
        if (run(current)) {  // changes add up
            pool[parent] = current;
            valid++;
        }
    }
    std::printf("%llu inputs, %llu valid\n", (unsigned long long)runs, (unsigned long long)valid);
}
