// Runs AMX machine code where the kernel has not handed out the AMX unit: on CPUs without one, and on CPUs with one.
//
// Preloaded (LD_PRELOAD), it answers requests for the unit itself and never forwards them, so that the CPU raises an exception at
// every instruction that touches tile data. The handler decodes the instruction, executes it on the thread's own software tiles
// and goes on behind it. All other instructions run as they are.
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "emulator.h"

#define EXPORT __attribute__((visibility("default")))

enum { GET_SUPPORTED = 0x1021, GET_PERMITTED = 0x1022, REQUEST = 0x1023 };  // arch_prctl: ARCH_*_XCOMP_*
enum { TILE_CONFIGURATION = 17, TILE_DATA = 18 };                           // components of the processor's extended state

static bool refuse, fast;
static atomic_bool granted;
static atomic_long traps, executed[OPERATIONS];
static uint32_t configuration_offset;  // of the tile configuration in a signal frame; 0 on a CPU without AMX
static _Thread_local Tiles tiles __attribute__((tls_model("initial-exec")));  // no lazy allocation within a signal handler

EXPORT long amx_emulator_traps(void) { return atomic_load(&traps); }

// How often an instruction was executed, by its name in small letters; -1 for an unknown name.
EXPORT long amx_emulator_executed(const char* name) {
    for (int i = 0; i < OPERATIONS; i++)
        if (!strcmp(name, operation_names[i]))
            return atomic_load(&executed[i]);
    return -1;
}

static void write_line(const char* line, int length) {  // one write: lines of several threads do not mix
    if (length > 0 && write(STDERR_FILENO, line, (size_t)length) < 0) {}
}

// ------------------------------------------------------------------------------------------- the native configuration
// XFD, by which Linux withholds the unit, guards the tile data only. On a CPU with AMX, LDTILECFG, STTILECFG and TILERELEASE
// therefore never trap: they work on the real configuration register, which every signal frame holds. It is compared at each trap
// with what the last trap left there, and left marked by an impossible start_row, so that the loading of an equal configuration
// (which clears the tiles) is noticed as well.

enum { MARK = 255 };

typedef struct {
    uint8_t* bytes;
    uint64_t* present;  // one bit for every component of the state that the frame holds
} NativeConfiguration;

static bool find_native_configuration(const ucontext_t* context, NativeConfiguration* out) {
    uint8_t* frame = (uint8_t*)context->uc_mcontext.fpregs;
    struct {  // struct _fpx_sw_bytes of <asm/sigcontext.h>
        uint32_t magic, extended_size;
        uint64_t components;
    } about;
    if (!configuration_offset || !frame)
        return false;
    memcpy(&about, frame + 464, sizeof(about));
    if (about.magic != 0x46505853 || !(about.components >> TILE_CONFIGURATION & 1))
        return false;
    *out = (NativeConfiguration){frame + configuration_offset, (uint64_t*)(frame + 512)};
    return true;
}

static void read_native_configuration(const ucontext_t* context) {
    NativeConfiguration native;
    if (!find_native_configuration(context, &native))
        return;
    uint8_t now[CONFIGURATION_BYTES] = {0}, left[CONFIGURATION_BYTES];
    if (*native.present >> TILE_CONFIGURATION & 1)
        memcpy(now, native.bytes, sizeof(now));
    store_configuration(&tiles, left);
    if (tiles.palette)
        left[1] = MARK;
    if (memcmp(now, left, sizeof(now)))
        load_configuration(now, &tiles);  // the CPU has checked it
}

static void write_native_configuration(const ucontext_t* context) {
    NativeConfiguration native;
    if (!find_native_configuration(context, &native))
        return;
    *native.present &= ~(1ull << TILE_CONFIGURATION);
    if (!tiles.palette)
        return;
    *native.present |= 1ull << TILE_CONFIGURATION;
    store_configuration(&tiles, native.bytes);
    native.bytes[1] = MARK;
}

// ---------------------------------------------------------------------------------------------------- signal handling

static struct sigaction programs_own[NSIG];  // the program's handlers for the signals that are ours

static int set_handler(int number, const struct sigaction* action, struct sigaction* old) {
    extern int __sigaction(int, const struct sigaction*, struct sigaction*);  // libc's, behind our own below
    return __sigaction(number, action, old);
}

static bool is_ours(int number) { return number == SIGILL || (fast && number == SIGTRAP); }

// What would have happened without the emulator. Returning runs the instruction again, which then ends the process.
static void pass_on(int number, siginfo_t* info, void* context) {
    const struct sigaction own = programs_own[number];
    if (own.sa_flags & SA_SIGINFO) {
        own.sa_sigaction(number, info, context);
    } else if (own.sa_handler != SIG_DFL && own.sa_handler != SIG_IGN) {
        own.sa_handler(number);
    } else {
        const struct sigaction standard = {.sa_handler = SIG_DFL};
        set_handler(number, &standard, NULL);
        if (number == SIGTRAP || info->si_code <= 0)  // int3 is behind us; what was sent by a process does not come again
            raise(number);
    }
}

static Fault execute_permitted(const Instruction* in) {
    if (in->operation > TILERELEASE && !atomic_load(&granted))
        return (Fault){SIGILL, "#NM: arch_prctl(ARCH_REQ_XCOMP_PERM, 18) was not asked first, or was refused"};
    const Fault fault = execute(in, &tiles);
    if (!fault.signal)
        atomic_fetch_add_explicit(&executed[in->operation], 1, memory_order_relaxed);
    return fault;
}

// Fast mode: int3 instead of the exception, which a hypervisor may want to see first. A single byte is written, so other threads
// read the old instruction or the new one.
static void mark_instruction(uint8_t* code) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (*code == 0xCC || mprotect((void*)((uintptr_t)code & -page), page, PROT_READ | PROT_WRITE | PROT_EXEC))
        return;
    __atomic_store_n(code, 0xCC, __ATOMIC_SEQ_CST);
}

static void on_trap(int number, siginfo_t* info, void* opaque) {
    const int saved_errno = errno;
    ucontext_t* context = opaque;
    greg_t* registers = context->uc_mcontext.gregs;
    uint8_t* code = (uint8_t*)registers[REG_RIP] - (number == SIGTRAP);
    Instruction in;
    if (info->si_code <= 0 || !decode(code, registers, &in) || (number == SIGTRAP && *code != 0xCC)) {
        pass_on(number, info, context);
        errno = saved_errno;
        return;
    }
    read_native_configuration(context);
    atomic_fetch_add_explicit(&traps, 1, memory_order_relaxed);
    Fault fault;
    do {  // tile instructions come in rows: the next ones are taken along
        fault = execute_permitted(&in);
        if (fault.signal)
            break;
        if (fast)
            mark_instruction(code);
        code += in.length;
    } while (decode(code, registers, &in) && (*code == 0xC4 || fast));
    registers[REG_RIP] = (greg_t)code;
    write_native_configuration(context);
    if (fault.signal) {
        char line[256];
        write_line(line,
                   snprintf(line, sizeof(line), "amx_emulator: %s at %p: %s\n", operation_names[in.operation], (void*)code, fault.reason));
        if (is_ours(fault.signal))
            pass_on(fault.signal, info, context);
        else
            raise(fault.signal);
    }
    errno = saved_errno;
}

EXPORT int sigaction(int number, const struct sigaction* action, struct sigaction* old) {
    if (!is_ours(number))
        return set_handler(number, action, old);
    const struct sigaction previous = programs_own[number];
    if (action)
        programs_own[number] = *action;
    if (old)
        *old = previous;
    return 0;
}

EXPORT void (*signal(int number, void (*handler)(int)))(int) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;
    sigemptyset(&action.sa_mask);
    return sigaction(number, &action, &old) ? SIG_ERR : old.sa_handler;
}

// ------------------------------------------------------------------------------------------- permission and life cycle

static long answer(long code, unsigned long argument) {
    if (code == REQUEST && refuse)
        return -EPERM;
    if (code == REQUEST) {
        atomic_store(&granted, true);
        return 0;
    }
    uint64_t states = 0x2E7;  // x87 to AVX-512, PKRU
    if (!refuse && (code == GET_SUPPORTED || atomic_load(&granted)))
        states |= 1 << TILE_CONFIGURATION | 1 << TILE_DATA;
    memcpy((void*)argument, &states, sizeof(states));
    return 0;
}

EXPORT long syscall(long number, ...) {
    va_list list;
    va_start(list, number);
    long argument[6];
    for (int i = 0; i < 6; i++)
        argument[i] = va_arg(list, long);
    va_end(list);
    long result;
    if (number == SYS_arch_prctl &&
        ((argument[0] == REQUEST && argument[1] == TILE_DATA) || argument[0] == GET_SUPPORTED || argument[0] == GET_PERMITTED)) {
        result = answer(argument[0], (unsigned long)argument[1]);
    } else {
        register long r10 __asm__("r10") = argument[3];
        register long r8 __asm__("r8") = argument[4];
        register long r9 __asm__("r9") = argument[5];
        __asm__ volatile("syscall"
                         : "=a"(result)
                         : "0"(number), "D"(argument[0]), "S"(argument[1]), "d"(argument[2]), "r"(r10), "r"(r8), "r"(r9)
                         : "rcx", "r11", "memory");
    }
    if (result >= 0 || result < -4095)
        return result;
    errno = (int)-result;
    return -1;
}

static void print_counts(void) {
    char line[512];
    int length = snprintf(line, sizeof(line), "amx_emulator: %ld traps:", atomic_load(&traps));
    for (int i = 0; i < OPERATIONS; i++)
        if (atomic_load(&executed[i]))
            length += snprintf(line + length, sizeof(line) - (size_t)length, " %s=%ld", operation_names[i], atomic_load(&executed[i]));
    length += snprintf(line + length, sizeof(line) - (size_t)length, "\n");
    write_line(line, length);
}

static bool is_set(const char* name, const char* value) {
    const char* found = getenv(name);
    return found && !strcmp(found, value);
}

__attribute__((constructor)) static void start(void) {
    refuse = is_set("AMX_EMULATOR_PERMISSION", "refuse");
    fast = is_set("AMX_EMULATOR_FAST", "1");
    uint32_t a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && __get_cpuid_count(13, TILE_CONFIGURATION, &a, &b, &c, &d))
        configuration_offset = b;
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    set_handler(SIGILL, &action, &programs_own[SIGILL]);
    if (fast)
        set_handler(SIGTRAP, &action, &programs_own[SIGTRAP]);
    if (is_set("AMX_EMULATOR_STATS", "1"))
        atexit(print_counts);
}
