/* A double of NVIDIA's management library: four GPUs whose wiring is that of a small server, and failures on demand.
 *
 * As strict as the real one: everything but init fails before init, handles are checked, lengths are checked, what a GPU
 * does not support is answered so.
 *
 *   FAKE_NVML=hang-init | hang-uuid | driver-not-loaded | lost | lost-late | unknown | noisy
 *   FAKE_NVML_XID=FILE   an Xid happens on GPU 1 when FILE appears: 79, or the number in FILE
 *   FAKE_NVML_LINK_DOWN=FILE   link 3 of GPU 1 is inactive while FILE is there
 *   FAKE_NVML_ECC=N      uncorrected memory errors of GPU 1
 *
 * GPU 0 and 1 have four NVLinks between them, GPU 2 and 3 each two to one switch; GPU 3 is split into two MIG instances.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15, UNKNOWN = 999 };
enum { GPUS = 4, MIGS = 2, LINKS = 4, XID = 8 };

typedef struct { int gpu; int mig; } Handle;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { Handle *device; unsigned long long type, data; unsigned gi, ci; } Event;

static Handle gpus[GPUS] = { {0, -1}, {1, -1}, {2, -1}, {3, -1} };
static Handle migs[MIGS] = { {3, 0}, {3, 1} };
static const unsigned buses[GPUS] = { 0x1b, 0x3b, 0x9b, 0xbb };
static int initialised, set_made, asked_names;

static int mode(const char *name) { const char *now = getenv("FAKE_NVML"); return now && !strcmp(now, name); }
static void hang(void) { for (;;) pause(); }
static int lost(const Handle *h) { return h->gpu == 2 && (mode("lost") || (mode("lost-late") && asked_names)); }
static int check(const Handle *h) {
    if (!initialised) return UNINITIALIZED;
    for (int i = 0; i < GPUS; i++) if (h == &gpus[i]) return lost(h) ? GPU_IS_LOST : OK;
    for (int i = 0; i < MIGS; i++) if (h == &migs[i]) return OK;
    return INVALID_ARGUMENT;
}
#define CHECK(h) do { int bad = check(h); if (bad) return bad; } while (0)
static int put(char *to, unsigned length, const char *text) {
    if (strlen(text) + 1 > length) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return OK;
}
static void place(Pci *p, unsigned bus) {
    memset(p, 0, sizeof *p);
    p->bus = bus;
    snprintf(p->legacy, sizeof p->legacy, "0000:%02X:00.0", bus);
    snprintf(p->bus_id, sizeof p->bus_id, "00000000:%02X:00.0", bus);
}

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (mode("hang-init")) hang();
    if (mode("driver-not-loaded")) return DRIVER_NOT_LOADED;
    if (mode("noisy")) { printf("NVML says hello\n"); fflush(stdout); }
    initialised++;
    return OK;
}
EXPORT int nvmlShutdown(void) { if (!initialised) return UNINITIALIZED; initialised--; return OK; }
EXPORT const char *nvmlErrorString(int code) { (void)code; return "an error of the double"; }
EXPORT int nvmlSystemGetDriverVersion(char *to, unsigned length) {
    if (!initialised) return UNINITIALIZED;
    return mode("unknown") ? UNKNOWN : put(to, length, "580.95.05");
}
EXPORT int nvmlDeviceGetCount_v2(unsigned *count) { if (!initialised) return UNINITIALIZED; *count = GPUS; return OK; }
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle **to) {
    if (!initialised) return UNINITIALIZED;
    if (index >= GPUS) return INVALID_ARGUMENT;
    CHECK(&gpus[index]);
    *to = &gpus[index];
    return OK;
}
EXPORT int nvmlDeviceGetUUID(Handle *h, char *to, unsigned length) {
    char text[80];
    CHECK(h);
    if (mode("hang-uuid") && h->gpu == 1) hang();
    asked_names = 1;
    snprintf(text, sizeof text, "%s-%08x-0000-0000-0000-%012x", h->mig < 0 ? "GPU" : "MIG", h->gpu, h->mig + 1);
    return put(to, length, text);
}
EXPORT int nvmlDeviceGetName(Handle *h, char *to, unsigned length) {
    CHECK(h);
    return put(to, length, h->mig < 0 ? "NVIDIA Double 80GB" : h->mig ? "NVIDIA Double 80GB MIG 1g.10gb"
                                                                      : "NVIDIA Double 80GB MIG 3g.40gb");
}
EXPORT int nvmlDeviceGetPciInfo_v3(Handle *h, Pci *to) { CHECK(h); place(to, buses[h->gpu]); return OK; }
EXPORT int nvmlDeviceGetMemoryInfo(Handle *h, Memory *to) {
    CHECK(h);
    to->total = (h->mig < 0 ? 80ULL : h->mig ? 10ULL : 40ULL) << 30;
    to->free = to->total;
    to->used = 0;
    return OK;
}
EXPORT int nvmlDeviceGetMinorNumber(Handle *h, unsigned *to) {
    CHECK(h);
    if (h->mig >= 0) return NOT_SUPPORTED;
    *to = (unsigned)h->gpu;
    return OK;
}
EXPORT int nvmlDeviceGetMigMode(Handle *h, unsigned *now, unsigned *pending) {
    CHECK(h);
    if (h->gpu < 2) return NOT_SUPPORTED;
    *now = *pending = h->gpu == 3;
    return OK;
}
EXPORT int nvmlDeviceGetMaxMigDeviceCount(Handle *h, unsigned *to) { CHECK(h); *to = h->gpu == 3 ? 7 : 0; return OK; }
EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(Handle *h, unsigned index, Handle **to) {
    CHECK(h);
    if (h->gpu != 3 || index >= 7) return INVALID_ARGUMENT;
    if (index != 0 && index != 4) return NOT_FOUND;
    *to = &migs[index ? 1 : 0];
    return OK;
}
EXPORT int nvmlDeviceGetGpuInstanceId(Handle *h, unsigned *to) {
    CHECK(h);
    if (h->mig < 0) return INVALID_ARGUMENT;
    *to = h->mig ? 9 : 2;
    return OK;
}
EXPORT int nvmlDeviceGetComputeInstanceId(Handle *h, unsigned *to) {
    CHECK(h);
    if (h->mig < 0) return INVALID_ARGUMENT;
    *to = 0;
    return OK;
}
EXPORT int nvmlDeviceGetNvLinkState(Handle *h, unsigned link, unsigned *to) {
    CHECK(h);
    if (link >= LINKS) return INVALID_ARGUMENT;
    if (h->gpu >= 2 && link == 1) return NOT_SUPPORTED;
    *to = h->gpu < 2 || link >= 2;
    if (h->gpu == 1 && link == 3 && getenv("FAKE_NVML_LINK_DOWN") && !access(getenv("FAKE_NVML_LINK_DOWN"), F_OK)) *to = 0;
    return OK;
}
EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(Handle *h, unsigned link, Pci *to) {
    CHECK(h);
    if (link >= LINKS) return INVALID_ARGUMENT;
    place(to, h->gpu < 2 ? buses[1 - h->gpu] : 0xd1);
    return OK;
}
EXPORT int nvmlDeviceGetTotalEccErrors(Handle *h, int type, int counter, unsigned long long *to) {
    CHECK(h);
    if (type != 1 || counter < 0 || counter > 1) return INVALID_ARGUMENT;
    if (h->gpu == 0) return NOT_SUPPORTED;
    *to = !counter && h->gpu == 1 && getenv("FAKE_NVML_ECC") ? strtoull(getenv("FAKE_NVML_ECC"), NULL, 10) : 0;
    return OK;
}
EXPORT int nvmlDeviceGetRemappedRows(Handle *h, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    CHECK(h);
    if (h->gpu == 0) return NOT_SUPPORTED;
    *corrected = *uncorrected = *failed = 0;
    *pending = h->gpu == 1 && getenv("FAKE_NVML_ROWS_PENDING") != NULL;
    return OK;
}
/* The fabric, of FAKE_NVML_FABRIC=1: GPU 0 and 1 are in one clique, GPU 2 is still being registered, GPU 3 (in MIG mode) has
 * none. */
typedef struct { unsigned char cluster[16]; int status; unsigned clique; unsigned char state; } Fabric;
enum { FABRIC_IN_PROGRESS = 2, FABRIC_COMPLETED = 3 };
EXPORT int nvmlDeviceGetGpuFabricInfo(Handle *h, Fabric *to) {
    CHECK(h);
    if (!to) return INVALID_ARGUMENT;
    if (h->gpu == 3 || !getenv("FAKE_NVML_FABRIC")) return NOT_SUPPORTED;
    memset(to, 0, sizeof *to);
    to->state = h->gpu == 2 ? FABRIC_IN_PROGRESS : FABRIC_COMPLETED;
    if (h->gpu < 2) { memset(to->cluster, 0xab, sizeof to->cluster); to->clique = 7; }
    return OK;
}
EXPORT int nvmlEventSetCreate(void **to) {
    if (!initialised) return UNINITIALIZED;
    *to = &set_made;
    set_made = 1;
    return OK;
}
EXPORT int nvmlEventSetFree(void *set) { return set == &set_made ? OK : INVALID_ARGUMENT; }
EXPORT int nvmlDeviceGetSupportedEventTypes(Handle *h, unsigned long long *to) {
    CHECK(h);
    if (h->gpu == 0) return NOT_SUPPORTED;
    *to = XID | 1;
    return OK;
}
EXPORT int nvmlDeviceRegisterEvents(Handle *h, unsigned long long types, void *set) {
    CHECK(h);
    return types == XID && set == &set_made ? OK : INVALID_ARGUMENT;
}
EXPORT int nvmlEventSetWait_v2(void *set, Event *to, unsigned wait_ms) {
    const char *file = getenv("FAKE_NVML_XID");
    if (set != &set_made) return INVALID_ARGUMENT;
    for (unsigned waited = 0; waited < wait_ms; waited += 10) {
        FILE *said = file ? fopen(file, "r") : NULL;
        if (said) {
            memset(to, 0, sizeof *to);
            if (fscanf(said, "%llu", &to->data) != 1) to->data = 79;
            fclose(said);
            unlink(file);
            to->device = &gpus[1];
            to->type = XID;
            to->gi = to->ci = ~0u;
            return OK;
        }
        usleep(10000);
    }
    return TIMEOUT;
}
