/* Answers CPUID and XGETBV as a Xeon Phi 7250 does. pretend.py has put ud2 in their place in a copy
 * of oneDNN and compiles this with SITES, where they were; the signal that ud2 raises is handled
 * here. Any other instruction that the host lacks ends the process: status 99, and its bytes. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <ucontext.h>
#include <unistd.h>

enum { EAX, EBX, ECX, EDX };
enum { FAILED = 99, PAGE = 4096, LONGEST = 15 };

static const uintptr_t sites[] = {SITES}; /* from the start of the library */
static int answers;

static void pretend(uint32_t leaf, uint32_t part, uint32_t r[4]) {
  static const uint32_t caches[][4] = {
      /* type, level, sharing; ways, line; sets: 32 KiB of data, of code, 1 MiB for two cores */
      {0x1c00c121, 0x01c0003f, 63, 0},
      {0x1c00c122, 0x01c0003f, 63, 0},
      {0x1c01c143, 0x03c0003f, 1023, 0}};
  switch (leaf) {
    case 0: r[EAX] = 13, r[EBX] = 0x756e6547, r[EDX] = 0x49656e69, r[ECX] = 0x6c65746e; break;
    case 1: /* family 6, model 0x57, up to 255 threads; features up to AVX, FMA, F16C, RDRAND */
      r[EAX] = 0x50671, r[EBX] |= 0xffu << 16, r[ECX] = 0x7ff8fbbf, r[EDX] = 0xbfebfbff;
      break;
    case 4:
      for (int n = 0; n < 4; n++) r[n] = part < 3 ? caches[part][n] : 0;
      break;
    case 7: /* FSGSBASE BMI1 AVX2 BMI2 ERMS, AVX512 F, RDSEED ADX, AVX512 PF ER CD; PREFETCHWT1 */
      r[EAX] = r[EBX] = r[ECX] = r[EDX] = 0;
      if (part == 0) {
        r[EBX] = 1u | 1u << 3 | 1u << 5 | 1u << 8 | 1u << 9 | 1u << 16 | 1u << 18 | 1u << 19;
        r[EBX] |= 1u << 26 | 1u << 27 | 1u << 28;
        r[ECX] = 1;
      }
      break;
    case 0xb: /* 4 threads a core, 68 cores */
      r[EAX] = part == 0 ? 2 : part == 1 ? 9 : 0;
      r[EBX] = part == 0 ? 4 : part == 1 ? 272 : 0;
      r[ECX] = part | (part < 2 ? part + 1 : 0) << 8;
      break;
    case 0x80000001: /* LAHF LZCNT PREFETCHW; SYSCALL NX 1 GiB pages RDTSCP 64 bits */
      r[EAX] = r[EBX] = 0, r[ECX] = 0x121, r[EDX] = 0x2c100800;
      break;
    default: break; /* what the host says: brand, addresses, state that XSAVE keeps */
  }
}

/* Whether this ud2 replaces an instruction: the library may have some of its own. */
static int is_ours(const uint8_t *at) {
  Dl_info library;
  if (!dladdr(at, &library)) return 0;
  const uintptr_t place = (uintptr_t)at - (uintptr_t)library.dli_fbase;
  for (unsigned n = 0; n < sizeof sites / sizeof *sites; n++)
    if (sites[n] == place && at[0] == 0x0f && at[1] == 0x0b) return 1;
  return 0;
}

static void refuse(const uint8_t *at) {
  char text[160];
  int length = snprintf(text, sizeof text, "SIGILL of a real instruction at %p:", (const void *)at);
  int readable = PAGE - (int)((uintptr_t)at % PAGE);
  for (int n = 0; n < LONGEST && n < readable; n++)
    length += snprintf(text + length, sizeof text - length, " %02x", at[n]);
  text[length++] = '\n';
  _exit(write(2, text, length) ? FAILED : FAILED);
}

static void on_illegal(int number, siginfo_t *info, void *context) {
  (void)number, (void)info;
  greg_t *at = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *code = (const uint8_t *)at[REG_RIP];
  if (!is_ours(code)) refuse(code);
  answers++;
  if (code[2] == 0x90) { /* xgetbv: the system keeps xmm, ymm, zmm and mask registers */
    at[REG_RAX] = 0xe7, at[REG_RDX] = 0, at[REG_RIP] += 3;
    return;
  }
  uint32_t r[4];
  const uint32_t leaf = (uint32_t)at[REG_RAX], part = (uint32_t)at[REG_RCX];
  __cpuid_count(leaf, part, r[EAX], r[EBX], r[ECX], r[EDX]);
  pretend(leaf, part, r);
  at[REG_RAX] = r[EAX], at[REG_RBX] = r[EBX], at[REG_RCX] = r[ECX], at[REG_RDX] = r[EDX];
  at[REG_RIP] += 2;
}

/* How often CPUID and XGETBV were answered. */
int pretend_answers(void) { return answers; }

/* The library's constructors ask already, so this one comes before it is loaded. */
__attribute__((constructor)) static void install(void) {
  struct sigaction how = {0};
  how.sa_sigaction = on_illegal;
  how.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &how, NULL);
}
