// Runs machine code of the tests, on the emulator or on the real unit: run_cases CODE INPUT OUTPUT [int3]
//
// CODE is a shared library with functions case_0, case_1, ... void(uint8_t* memory, uint64_t 64); INPUT holds 16 KiB of memory for
// each of them. OUTPUT gets, for each, the signal that ended it (int32, 0 = it returned) and the memory afterwards. The memory
// lies at a fixed address, between pages that cannot be touched. "int3" puts the mark of the emulator's fast mode over every AMX
// instruction before it has run once, so that also those trap that the CPU knows.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BYTES = 16384, PAGE = 4096 };
static uint8_t* const memory = (uint8_t*)0x10000000;
static sigjmp_buf back;

static void on_signal(int number) { siglongjmp(back, number); }

static void must(int condition, const char* what) {
    if (!condition) {
        perror(what);
        exit(2);
    }
}

// Cases hold nothing but AMX instructions and plain moves, so the bytes cannot be anything else.
static void mark(uint8_t* code, const uint8_t* end) {
    const uintptr_t first = (uintptr_t)code & -PAGE;
    must(!mprotect((void*)first, (uintptr_t)end - first, PROT_READ | PROT_WRITE | PROT_EXEC), "mprotect");
    for (; code + 5 < end; code++) {
        const int opcode = code[3];
        if (*code == 0xC4 && (code[1] & 0x1F) == 2 && (opcode == 0x49 || opcode == 0x4B || opcode == 0x5C || opcode == 0x5E))
            *code = 0xCC;
    }
}

int main(int count, char** arguments) {
    must(count >= 4, "arguments");
    must(mmap(memory - PAGE, BYTES + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == memory - PAGE,
         "mmap");
    must(!mprotect(memory, BYTES, PROT_READ | PROT_WRITE), "mprotect");
    must(!syscall(SYS_arch_prctl, 0x1023, 18), "ARCH_REQ_XCOMP_PERM");
    void* cases = dlopen(arguments[1], RTLD_NOW);
    must(cases != NULL, "dlopen");
    if (count == 5)
        mark(dlsym(cases, "case_0"), dlsym(cases, "end_of_cases"));
    FILE *input = fopen(arguments[2], "rb"), *output = fopen(arguments[3], "wb");
    must(input && output, "files");
    const int numbers[] = {SIGILL, SIGSEGV, SIGBUS, SIGTRAP};
    static uint8_t stack[1 << 16];  // a case may borrow rsp
    const stack_t alternative = {.ss_sp = stack, .ss_size = sizeof(stack)};
    must(!sigaltstack(&alternative, NULL), "sigaltstack");
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    for (int i = 0; i < 4; i++)
        sigaction(numbers[i], &action, NULL);
    char name[32];
    for (int i = 0; fread(memory, BYTES, 1, input) == 1; i++) {
        snprintf(name, sizeof(name), "case_%d", i);
        void (*run)(uint8_t*, uint64_t) = dlsym(cases, name);
        must(run != NULL, "dlsym");
        const int32_t number = sigsetjmp(back, 1);
        if (!number)
            run(memory, 64);
        __asm__ volatile(".byte 0xC4, 0xE2, 0x78, 0x49, 0xC0");  // tilerelease: the next case starts without tiles
        must(fwrite(&number, 4, 1, output) == 1 && fwrite(memory, BYTES, 1, output) == 1, "write");
    }
    return fclose(output);
}
