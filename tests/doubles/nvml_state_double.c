/* A double of NVIDIA's management library whose GPUs are in a file, so that what is created outlives the process.
 *
 *   FAKE_NVML_STATE=FILE   the state; tests/support/mig_driver.py writes and reads it. FILE.lock is held during a call.
 *   FAKE_NVML_FROZEN=1     the state is read once: for measuring what asking costs without what the double costs.
 *
 * Lines of the file, separated by spaces:
 *   gpu BUS NOW PENDING RESET PROCESSES LOST MEMORY_MIB SLICES SM CE DEC ENC JPEG OFA NAME   (NAME to the end)
 *   profile GPU ENUM ID MEMORY_MIB MOST SLICES SM CE DEC ENC JPEG OFA SIZE NAME STARTS       (STARTS: 0,2,4)
 *   gi GPU ID ENUM START BUSY
 *   ci GPU GI ID
 *   health GPU NAME VALUE        what is not as on a GPU without faults: the names are in `signs`
 *   errors GPU GI COUNT          uncorrected errors of the SRAM of an instance
 *   xid GPU CODE GI CI           an error that is reported once; GI and CI are -1 if it is of the whole GPU. It is looked
 *                                for only with FAKE_NVML_XIDS=1
 *   fault FUNCTION hang|hang-after|CODE COUNT
 *
 * Compiled with -DOLD_DRIVER, it lacks the functions that came after driver 525.
 *
 * As strict as a driver: a GPU instance is created only on free memory slices, with free compute slices and engines, and
 * only as often as its profile says; one that has compute instances or is busy cannot be destroyed; the MIG mode does not
 * change while there are instances or processes, and where RESET is 1 it changes at the next reset only. A structure of a
 * version that the driver does not know is refused. In MIG mode the volatile errors of the whole GPU cannot be asked for, and
 * with instances neither can its remapped rows (nvml.h).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       TIMEOUT = 10, GPU_IS_LOST = 15, IN_USE = 19, INSUFFICIENT_RESOURCES = 23, VERSION_MISMATCH = 25, UNKNOWN = 999 };
enum { GPUS = 16, PROFILES = 18, IDS = 16, STARTS = 16, FAULTS = 16, ENGINES = 6, CI_PROFILES = 9 };

typedef struct { int gpu, gi, ci; } Handle;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned start, size; } Placement;
typedef struct { unsigned version, id, p2p, slices, count, sm, ce, dec, enc, jpeg, ofa; unsigned long long mb; char name[96]; } GiProfile;
typedef struct { unsigned version, id, slices, count, sm, ce, dec, enc, jpeg, ofa; char name[96]; } CiProfile;
typedef struct { Handle *device; unsigned id, profile; Placement place; } GiInfo;
typedef struct { Handle *device, *gi; unsigned id, profile; Placement place; } CiInfo;

typedef struct { int there; unsigned id, mib, most, slices, units[ENGINES], size, starts[STARTS], places; char name[64]; } Profile;
typedef struct { int there, profile, busy; unsigned start; unsigned cis; unsigned long long errors; } Instance;
enum { ECC_VOLATILE, ECC_AGGREGATE, ROWS_CORRECTED, ROWS_UNCORRECTED, ROWS_PENDING, ROWS_FAILED, BANKS_NONE, SRAM, CLOCKS,
       FABRIC_STATE, FABRIC_STATUS, FABRIC_HEALTH, FABRIC_VERSION, REPLAYS, RECOVERIES, CRC_FLIT, CRC_DATA, RECOVERY,
       LINKS, LINKS_DOWN, SIGNS };
static const char *signs[SIGNS] = {
    "ecc_volatile", "ecc_aggregate", "rows_corrected", "rows_uncorrected", "rows_pending", "rows_failed", "banks_none", "sram",
    "clocks", "fabric_state", "fabric_status", "fabric_health", "fabric_version", "replays", "recoveries", "crc_flit", "crc_data",
    "recovery", "links", "links_down" };   /* links: how many NVLinks are wired; links_down: a mask of those that are inactive */
typedef struct {
    unsigned bus, now, pending, reset, processes, lost, mib, slices, units[ENGINES];
    char name[96];
    Profile profiles[PROFILES];
    Instance gis[IDS];
    unsigned long long signs[SIGNS];
} Gpu;
typedef struct { unsigned gpu; unsigned long long code; int gi, ci; } Error;
typedef struct { char function[64], what[16]; int count; } Fault;

static struct { int gpus, faults, errors; Gpu gpu[GPUS]; Fault fault[FAULTS]; Error error[FAULTS]; } now;
static Handle wholes[GPUS], instances[GPUS][IDS], parts[GPUS][IDS], migs[GPUS][IDS];
static int initialised, lock = -1, set_made;
static pthread_mutex_t one_thread = PTHREAD_MUTEX_INITIALIZER;

/* ---------------------------------------------------------------- the file */

static void fail(const char *what) { fprintf(stderr, "nvml_state_double: %s\n", what); abort(); }
static const char *path(void) { const char *p = getenv("FAKE_NVML_STATE"); if (!p) fail("FAKE_NVML_STATE is not set"); return p; }
static void load(void) {
    char name[4096], line[1024], text[512];
    if (now.gpus && getenv("FAKE_NVML_FROZEN")) return;
    pthread_mutex_lock(&one_thread);
    snprintf(name, sizeof name, "%s.lock", path());
    lock = open(name, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (lock < 0 || flock(lock, LOCK_EX)) fail("cannot lock");
    FILE *file = fopen(path(), "r");
    if (!file) fail("cannot open the state");
    memset(&now, 0, sizeof now);
    while (fgets(line, sizeof line, file)) {
        unsigned g, i, u[ENGINES]; int at = 0;
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "gpu ", 4)) {
            Gpu *o = &now.gpu[now.gpus++];
            if (sscanf(line, "gpu %x %u %u %u %u %u %u %u %u %u %u %u %u %u %n", &o->bus, &o->now, &o->pending, &o->reset,
                       &o->processes, &o->lost, &o->mib, &o->slices, &u[0], &u[1], &u[2], &u[3], &u[4], &u[5], &at) != 14) fail(line);
            memcpy(o->units, u, sizeof u);
            snprintf(o->name, sizeof o->name, "%s", line + at);
        } else if (sscanf(line, "profile %u %u %n", &g, &i, &at) == 2) {
            Profile *p = &now.gpu[g].profiles[i];
            char *next, *from = text;
            p->there = 1;
            if (sscanf(line + at, "%u %u %u %u %u %u %u %u %u %u %u %63s %511s", &p->id, &p->mib, &p->most, &p->slices, &u[0], &u[1],
                       &u[2], &u[3], &u[4], &u[5], &p->size, p->name, text) != 13) fail(line);
            memcpy(p->units, u, sizeof u);
            while ((next = strsep(&from, ","))) p->starts[p->places++] = (unsigned)atoi(next);
        } else if (!strncmp(line, "gi ", 3)) {
            Instance one = { .there = 1 };
            if (sscanf(line, "gi %u %u %d %u %d", &g, &i, &one.profile, &one.start, &one.busy) != 5) fail(line);
            now.gpu[g].gis[i] = one;
        } else if (!strncmp(line, "ci ", 3)) {
            unsigned ci;
            if (sscanf(line, "ci %u %u %u", &g, &i, &ci) != 3) fail(line);
            now.gpu[g].gis[i].cis |= 1u << ci;
        } else if (!strncmp(line, "health ", 7)) {
            unsigned long long value; int sign = 0;
            if (sscanf(line, "health %u %511s %llu", &g, text, &value) != 3) fail(line);
            while (sign < SIGNS && strcmp(signs[sign], text)) sign++;
            if (sign == SIGNS) fail(line);
            now.gpu[g].signs[sign] = value;
        } else if (!strncmp(line, "errors ", 7)) {
            unsigned long long count;
            if (sscanf(line, "errors %u %u %llu", &g, &i, &count) != 3) fail(line);
            now.gpu[g].gis[i].errors = count;
        } else if (!strncmp(line, "xid ", 4)) {
            Error *e = &now.error[now.errors++];
            if (sscanf(line, "xid %u %llu %d %d", &e->gpu, &e->code, &e->gi, &e->ci) != 4) fail(line);
        } else if (!strncmp(line, "fault ", 6)) {
            Fault *f = &now.fault[now.faults++];
            if (sscanf(line, "fault %63s %15s %d", f->function, f->what, &f->count) != 3) fail(line);
        } else if (*line) fail(line);
    }
    fclose(file);
}
static void save(void) {
    char draft[4096];
    snprintf(draft, sizeof draft, "%s.draft", path());
    FILE *file = fopen(draft, "w");
    if (!file) fail("cannot save");
    for (int g = 0; g < now.gpus; g++) {
        Gpu *o = &now.gpu[g];
        fprintf(file, "gpu %x %u %u %u %u %u %u %u", o->bus, o->now, o->pending, o->reset, o->processes, o->lost, o->mib, o->slices);
        for (int e = 0; e < ENGINES; e++) fprintf(file, " %u", o->units[e]);
        fprintf(file, " %s\n", o->name);
        for (int i = 0; i < PROFILES; i++) {
            Profile *p = &o->profiles[i];
            if (!p->there) continue;
            fprintf(file, "profile %d %d %u %u %u %u", g, i, p->id, p->mib, p->most, p->slices);
            for (int e = 0; e < ENGINES; e++) fprintf(file, " %u", p->units[e]);
            fprintf(file, " %u %s ", p->size, p->name);
            for (unsigned s = 0; s < p->places; s++) fprintf(file, "%s%u", s ? "," : "", p->starts[s]);
            fputc('\n', file);
        }
        for (int i = 0; i < IDS; i++) {
            Instance *x = &o->gis[i];
            if (!x->there) continue;
            fprintf(file, "gi %d %d %d %u %d\n", g, i, x->profile, x->start, x->busy);
            for (int c = 0; c < 8; c++) if (x->cis >> c & 1) fprintf(file, "ci %d %d %d\n", g, i, c);
            if (x->errors) fprintf(file, "errors %d %d %llu\n", g, i, x->errors);
        }
        for (int s = 0; s < SIGNS; s++) if (o->signs[s]) fprintf(file, "health %d %s %llu\n", g, signs[s], o->signs[s]);
    }
    for (int e = 0; e < now.errors; e++) {
        Error *x = &now.error[e];
        fprintf(file, "xid %u %llu %d %d\n", x->gpu, x->code, x->gi, x->ci);
    }
    for (int f = 0; f < now.faults; f++)
        if (now.fault[f].count) fprintf(file, "fault %s %s %d\n", now.fault[f].function, now.fault[f].what, now.fault[f].count);
    if (fclose(file) || rename(draft, path())) fail("cannot save");
}
static void unlock(void) { if (lock >= 0) { close(lock); lock = -1; pthread_mutex_unlock(&one_thread); } }
static void hang(void) { unlock(); for (;;) pause(); }

/* Begin a call: what is said of it in the file happens. Returns a code, or OK. */
static int begin(const char *function) {
    if (!initialised) return UNINITIALIZED;
    load();
    for (int f = 0; f < now.faults; f++) {
        Fault *one = &now.fault[f];
        if (strcmp(one->function, function) || !one->count || !strcmp(one->what, "hang-after")) continue;
        if (one->count > 0) one->count--;
        save();
        if (!strcmp(one->what, "hang")) hang();
        return atoi(one->what);
    }
    return OK;
}
/* End a call that changed something. */
static int done(const char *function, int code) {
    int late = 0;
    for (int f = 0; f < now.faults; f++) {
        Fault *one = &now.fault[f];
        if (strcmp(one->function, function) || !one->count || strcmp(one->what, "hang-after")) continue;
        if (one->count > 0) one->count--;
        late = 1;
    }
    save();
    if (late) hang();
    return code;
}
static int kind(const Handle *h, Handle table[GPUS][IDS]) { return h >= &table[0][0] && h < &table[0][0] + GPUS * IDS; }
static int whole(const Handle *h) { return h >= wholes && h < wholes + now.gpus; }
static int check(const Handle *h) {
    if (!whole(h) && !kind(h, migs) && !kind(h, instances) && !kind(h, parts)) return INVALID_ARGUMENT;
    if (now.gpu[h->gpu].lost) return GPU_IS_LOST;
    if (!whole(h) && !now.gpu[h->gpu].gis[h->gi].there) return NOT_FOUND;
    return OK;
}
#define BEGIN(h) do { int bad = begin(__func__); if (!bad && (h)) bad = check(h); if (bad) { unlock(); return bad; } } while (0)
#define END(code) do { int it = (code); unlock(); return it; } while (0)
#define WHOLE(h) do { if (!whole(h)) END(INVALID_ARGUMENT); } while (0)
#define IN_MIG(h) do { if (!now.gpu[(h)->gpu].now) END(NOT_SUPPORTED); } while (0)

static int put(char *to, unsigned length, const char *form, ...) {
    char text[256]; va_list rest;
    va_start(rest, form); vsnprintf(text, sizeof text, form, rest); va_end(rest);
    if (strlen(text) + 1 > length) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return OK;
}
static Profile *profile_of(const Handle *h) { Gpu *o = &now.gpu[h->gpu]; return &o->profiles[o->gis[h->gi].profile]; }
static int by_id(const Gpu *o, unsigned id) { for (int i = 0; i < PROFILES; i++) if (o->profiles[i].there && o->profiles[i].id == id) return i; return -1; }

/* ---------------------------------------------------------------- what is there */

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    initialised++;
    for (int g = 0; g < GPUS; g++) {
        wholes[g] = (Handle){ g, -1, -1 };
        for (int i = 0; i < IDS; i++) instances[g][i] = parts[g][i] = migs[g][i] = (Handle){ g, i, 0 };
    }
    return OK;
}
EXPORT int nvmlShutdown(void) { if (!initialised) return UNINITIALIZED; initialised--; return OK; }
EXPORT const char *nvmlErrorString(int code) {
    return code == INSUFFICIENT_RESOURCES ? "Insufficient Resources" : code == IN_USE ? "In use by another client" : "an error of the double";
}
EXPORT int nvmlSystemGetDriverVersion(char *to, unsigned length) { BEGIN(NULL); END(put(to, length, "580.95.05")); }
EXPORT int nvmlDeviceGetCount_v2(unsigned *count) { BEGIN(NULL); *count = (unsigned)now.gpus; END(OK); }
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle **to) {
    BEGIN(NULL);
    if (index >= (unsigned)now.gpus) END(INVALID_ARGUMENT);
    if (now.gpu[index].lost) END(GPU_IS_LOST);
    *to = &wholes[index];
    END(OK);
}
EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, Handle **to) {
    unsigned g;
    BEGIN(NULL);
    if (sscanf(uuid, "GPU-%8x-0000-0000-0000-000000000000", &g) != 1 || g >= (unsigned)now.gpus) END(NOT_FOUND);
    if (now.gpu[g].lost) END(GPU_IS_LOST);
    *to = &wholes[g];
    END(OK);
}
EXPORT int nvmlDeviceGetUUID(Handle *h, char *to, unsigned length) {
    BEGIN(h);
    if (whole(h)) END(put(to, length, "GPU-%08x-0000-0000-0000-000000000000", h->gpu));
    if (!kind(h, migs) || !(now.gpu[h->gpu].gis[h->gi].cis & 1)) END(NOT_FOUND);
    END(put(to, length, "MIG-%08x-0000-0000-0000-%012x", h->gpu, h->gi));
}
EXPORT int nvmlDeviceGetName(Handle *h, char *to, unsigned length) {
    BEGIN(h);
    if (whole(h)) END(put(to, length, "%s", now.gpu[h->gpu].name));
    END(put(to, length, "%s MIG %s", now.gpu[h->gpu].name, profile_of(h)->name));
}
EXPORT int nvmlDeviceGetPciInfo_v3(Handle *h, Pci *to) {
    BEGIN(h);
    memset(to, 0, sizeof *to);
    to->bus = now.gpu[h->gpu].bus;
    snprintf(to->legacy, sizeof to->legacy, "0000:%02X:00.0", to->bus);
    snprintf(to->bus_id, sizeof to->bus_id, "00000000:%02X:00.0", to->bus);
    END(OK);
}
EXPORT int nvmlDeviceGetMemoryInfo(Handle *h, Memory *to) {
    BEGIN(h);
    to->total = to->free = (unsigned long long)(whole(h) ? now.gpu[h->gpu].mib : profile_of(h)->mib) << 20;
    to->used = 0;
    END(OK);
}
EXPORT int nvmlDeviceGetMinorNumber(Handle *h, unsigned *to) { BEGIN(h); WHOLE(h); *to = (unsigned)h->gpu; END(OK); }
EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(Handle *h, unsigned *count, void *to) {
    BEGIN(h);
    unsigned there = whole(h) ? now.gpu[h->gpu].processes : 0, room = *count;
    *count = there;
    if (there && (room < there || !to)) END(INSUFFICIENT_SIZE);
    if (there) memset(to, 0, there * 24);
    END(OK);
}

/* ---------------------------------------------------------------- MIG */

EXPORT int nvmlDeviceGetMigMode(Handle *h, unsigned *mode, unsigned *pending) {
    BEGIN(h); WHOLE(h);
    *mode = now.gpu[h->gpu].now; *pending = now.gpu[h->gpu].pending;
    END(OK);
}
EXPORT int nvmlDeviceSetMigMode(Handle *h, unsigned mode, int *activation) {
    BEGIN(h); WHOLE(h);
    Gpu *o = &now.gpu[h->gpu];
    if (mode > 1) END(INVALID_ARGUMENT);
    for (int i = 0; i < IDS; i++) if (o->gis[i].there) END(IN_USE);
    o->pending = mode;
    *activation = o->reset ? UNKNOWN : o->processes ? IN_USE : OK;
    if (!*activation) o->now = mode;
    END(done(__func__, OK));
}
EXPORT int nvmlDeviceGetMaxMigDeviceCount(Handle *h, unsigned *to) { BEGIN(h); WHOLE(h); *to = now.gpu[h->gpu].slices; END(OK); }
EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(Handle *h, unsigned index, Handle **to) {
    BEGIN(h); WHOLE(h);
    unsigned seen = 0;
    if (index >= now.gpu[h->gpu].slices) END(INVALID_ARGUMENT);
    for (int i = 0; i < IDS; i++)
        if (now.gpu[h->gpu].gis[i].there && now.gpu[h->gpu].gis[i].cis && seen++ == index) { *to = &migs[h->gpu][i]; END(OK); }
    END(NOT_FOUND);
}
EXPORT int nvmlDeviceGetGpuInstanceId(Handle *h, unsigned *to) { BEGIN(h); if (!kind(h, migs)) END(INVALID_ARGUMENT); *to = (unsigned)h->gi; END(OK); }
EXPORT int nvmlDeviceGetComputeInstanceId(Handle *h, unsigned *to) { BEGIN(h); if (!kind(h, migs)) END(INVALID_ARGUMENT); *to = 0; END(OK); }
EXPORT int nvmlDeviceGetGpuInstanceProfileInfoV(Handle *h, unsigned profile, GiProfile *to) {
    BEGIN(h); WHOLE(h);
    if (to->version != (sizeof(GiProfile) | 2u << 24)) END(INVALID_ARGUMENT);
    if (profile >= PROFILES) END(INVALID_ARGUMENT);
    Profile *p = &now.gpu[h->gpu].profiles[profile];
    if (!p->there) END(NOT_SUPPORTED);
    to->id = p->id; to->p2p = 0; to->slices = p->slices; to->count = p->most; to->mb = p->mib;
    to->sm = p->units[0]; to->ce = p->units[1]; to->dec = p->units[2]; to->enc = p->units[3]; to->jpeg = p->units[4]; to->ofa = p->units[5];
    snprintf(to->name, sizeof to->name, "MIG %s", p->name);
    END(OK);
}
EXPORT int nvmlDeviceGetGpuInstancePossiblePlacements_v2(Handle *h, unsigned id, Placement *to, unsigned *count) {
    BEGIN(h); WHOLE(h);
    int i = by_id(&now.gpu[h->gpu], id);
    if (i < 0) END(NOT_SUPPORTED);
    Profile *p = &now.gpu[h->gpu].profiles[i];
    if (to && *count < p->places) END(INSUFFICIENT_SIZE);
    for (unsigned s = 0; to && s < p->places; s++) to[s] = (Placement){ p->starts[s], p->size };
    *count = p->places;
    END(OK);
}
EXPORT int nvmlDeviceGetGpuInstances(Handle *h, unsigned id, Handle **to, unsigned *count) {
    BEGIN(h); WHOLE(h); IN_MIG(h);
    Gpu *o = &now.gpu[h->gpu];
    int profile = by_id(o, id);
    if (profile < 0) END(NOT_SUPPORTED);
    *count = 0;
    for (int i = 0; i < IDS; i++) if (o->gis[i].there && o->gis[i].profile == profile) to[(*count)++] = &instances[h->gpu][i];
    END(OK);
}
EXPORT int nvmlDeviceGetGpuInstanceById(Handle *h, unsigned id, Handle **to) {
    BEGIN(h); WHOLE(h); IN_MIG(h);
    if (id >= IDS || !now.gpu[h->gpu].gis[id].there) END(NOT_FOUND);
    *to = &instances[h->gpu][id];
    END(OK);
}
EXPORT int nvmlGpuInstanceGetInfo(Handle *h, GiInfo *to) {
    BEGIN(h);
    if (!kind(h, instances)) END(INVALID_ARGUMENT);
    *to = (GiInfo){ &wholes[h->gpu], (unsigned)h->gi, profile_of(h)->id, { now.gpu[h->gpu].gis[h->gi].start, profile_of(h)->size } };
    END(OK);
}
EXPORT int nvmlDeviceCreateGpuInstanceWithPlacement(Handle *h, unsigned id, const Placement *at, Handle **to) {
    BEGIN(h); WHOLE(h); IN_MIG(h);
    Gpu *o = &now.gpu[h->gpu];
    int profile = by_id(o, id), legal = 0, same = 0, at_id = -1;
    if (profile < 0) END(NOT_SUPPORTED);
    Profile *p = &o->profiles[profile];
    for (unsigned s = 0; s < p->places; s++) legal |= p->starts[s] == at->start && p->size == at->size;
    if (!legal) END(INVALID_ARGUMENT);
    unsigned slices = p->slices, units[ENGINES];
    memcpy(units, p->units, sizeof units);
    for (int i = IDS - 1; i > 0; i--) {
        Instance *x = &o->gis[i];
        if (!x->there) { at_id = i; continue; }
        Profile *q = &o->profiles[x->profile];
        if (x->start < at->start + at->size && at->start < x->start + q->size) END(INSUFFICIENT_RESOURCES);
        slices += q->slices;
        same += x->profile == profile;
        for (int e = 0; e < ENGINES; e++) units[e] += q->units[e];
    }
    if (slices > o->slices || same >= (int)p->most || at_id < 0) END(INSUFFICIENT_RESOURCES);
    for (int e = 0; e < ENGINES; e++) if (units[e] > o->units[e]) END(INSUFFICIENT_RESOURCES);
    o->gis[at_id] = (Instance){ .there = 1, .profile = profile, .start = at->start };
    *to = &instances[h->gpu][at_id];
    END(done(__func__, OK));
}
EXPORT int nvmlGpuInstanceDestroy(Handle *h) {
    BEGIN(h);
    if (!kind(h, instances)) END(INVALID_ARGUMENT);
    Instance *x = &now.gpu[h->gpu].gis[h->gi];
    if (x->cis || x->busy) END(IN_USE);
    memset(x, 0, sizeof *x);
    END(done(__func__, OK));
}
EXPORT int nvmlGpuInstanceGetComputeInstanceProfileInfoV(Handle *h, unsigned profile, unsigned engine, CiProfile *to) {
    static const unsigned slices[CI_PROFILES] = { 1, 2, 3, 4, 7, 8, 6, 1, 7 };
    BEGIN(h);
    if (!kind(h, instances) || profile >= CI_PROFILES || engine || to->version != (sizeof(CiProfile) | 2u << 24)) END(INVALID_ARGUMENT);
    if (profile > 4 || slices[profile] > profile_of(h)->slices) END(NOT_SUPPORTED);
    to->id = profile; to->slices = slices[profile]; to->count = profile_of(h)->slices / slices[profile];
    END(OK);
}
EXPORT int nvmlGpuInstanceCreateComputeInstance(Handle *h, unsigned id, Handle **to) {
    static const unsigned slices[] = { 1, 2, 3, 4, 7 };
    BEGIN(h);
    if (!kind(h, instances)) END(INVALID_ARGUMENT);
    if (id > 4 || slices[id] > profile_of(h)->slices) END(NOT_SUPPORTED);
    if (now.gpu[h->gpu].gis[h->gi].cis) END(INSUFFICIENT_RESOURCES);
    now.gpu[h->gpu].gis[h->gi].cis |= 1;
    *to = &parts[h->gpu][h->gi];
    END(done(__func__, OK));
}
EXPORT int nvmlGpuInstanceGetComputeInstances(Handle *h, unsigned id, Handle **to, unsigned *count) {
    static const unsigned slices[] = { 1, 2, 3, 4, 7 };
    BEGIN(h);
    if (!kind(h, instances)) END(INVALID_ARGUMENT);
    if (id > 4 || slices[id] > profile_of(h)->slices) END(NOT_SUPPORTED);
    *count = now.gpu[h->gpu].gis[h->gi].cis && slices[id] == profile_of(h)->slices;
    if (*count) to[0] = &parts[h->gpu][h->gi];
    END(OK);
}
EXPORT int nvmlGpuInstanceGetComputeInstanceById(Handle *h, unsigned id, Handle **to) {
    BEGIN(h);
    if (!kind(h, instances)) END(INVALID_ARGUMENT);
    if (id || !now.gpu[h->gpu].gis[h->gi].cis) END(NOT_FOUND);
    *to = &parts[h->gpu][h->gi];
    END(OK);
}
EXPORT int nvmlComputeInstanceGetInfo_v2(Handle *h, CiInfo *to) {
    BEGIN(h);
    if (!kind(h, parts) || !now.gpu[h->gpu].gis[h->gi].cis) END(NOT_FOUND);
    *to = (CiInfo){ &wholes[h->gpu], &instances[h->gpu][h->gi], 0, 0, { 0, profile_of(h)->slices } };
    END(OK);
}
EXPORT int nvmlComputeInstanceDestroy(Handle *h) {
    BEGIN(h);
    if (!kind(h, parts)) END(INVALID_ARGUMENT);
    Instance *x = &now.gpu[h->gpu].gis[h->gi];
    if (!x->cis) END(NOT_FOUND);
    if (x->busy) END(IN_USE);
    x->cis = 0;
    END(done(__func__, OK));
}

/* ---------------------------------------------------------------- links, errors, events */

static unsigned long long sign(const Handle *h, int which) { return now.gpu[h->gpu].signs[which]; }
static int divided(const Handle *h) { for (int i = 0; i < IDS; i++) if (now.gpu[h->gpu].gis[i].there) return 1; return 0; }

EXPORT int nvmlDeviceGetNvLinkState(Handle *h, unsigned link, unsigned *to) {
    BEGIN(h); WHOLE(h);
    if (link >= sign(h, LINKS)) END(INVALID_ARGUMENT);
    *to = !(sign(h, LINKS_DOWN) >> link & 1);
    END(OK);
}
EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(Handle *h, unsigned link, Pci *to) {
    BEGIN(h); WHOLE(h);
    if (link >= sign(h, LINKS)) END(INVALID_ARGUMENT);
    memset(to, 0, sizeof *to);
    to->bus = 0xe1;   /* a switch */
    snprintf(to->bus_id, sizeof to->bus_id, "00000000:%02X:00.0", to->bus);
    END(OK);
}
EXPORT int nvmlDeviceGetTotalEccErrors(Handle *h, int type, int counter, unsigned long long *to) {
    BEGIN(h);
    if (type != 1 || counter < 0 || counter > 1 || !to) END(INVALID_ARGUMENT);
    if (!whole(h) || (!counter && now.gpu[h->gpu].now)) END(NOT_SUPPORTED);
    *to = sign(h, counter ? ECC_AGGREGATE : ECC_VOLATILE);
    END(OK);
}
EXPORT int nvmlDeviceGetMemoryErrorCounter(Handle *h, int type, int counter, int location, unsigned long long *to) {
    BEGIN(h);
    if (type < 0 || type > 1 || counter < 0 || counter > 1 || location < 0 || location > 7 || !to) END(INVALID_ARGUMENT);
    if (!kind(h, migs) || type != 1 || counter || location != 7) END(NOT_SUPPORTED);
    *to = now.gpu[h->gpu].gis[h->gi].errors;
    END(OK);
}
EXPORT int nvmlDeviceGetRemappedRows(Handle *h, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    BEGIN(h);
    if (!corrected || !uncorrected || !pending || !failed) END(INVALID_ARGUMENT);
    if (!whole(h) || (now.gpu[h->gpu].now && divided(h))) END(NOT_SUPPORTED);
    *corrected = (unsigned)sign(h, ROWS_CORRECTED); *uncorrected = (unsigned)sign(h, ROWS_UNCORRECTED);
    *pending = sign(h, ROWS_PENDING) != 0; *failed = sign(h, ROWS_FAILED) != 0;
    END(OK);
}
typedef struct { unsigned max, high, partial, low, none; } Histogram;
EXPORT int nvmlDeviceGetRowRemapperHistogram(Handle *h, Histogram *to) {
    BEGIN(h); WHOLE(h);
    if (!to) END(INVALID_ARGUMENT);
    *to = (Histogram){ .max = 640 - (unsigned)sign(h, BANKS_NONE), .none = (unsigned)sign(h, BANKS_NONE) };
    END(OK);
}
typedef struct { unsigned char cluster[16]; int status; unsigned clique; unsigned char state; } FabricV1;
EXPORT int nvmlDeviceGetGpuFabricInfo(Handle *h, FabricV1 *to) {
    BEGIN(h); WHOLE(h);
    if (!to) END(INVALID_ARGUMENT);
    if (!sign(h, FABRIC_STATE)) END(NOT_SUPPORTED);
    memset(to, 0, sizeof *to);
    to->state = (unsigned char)sign(h, FABRIC_STATE); to->status = (int)sign(h, FABRIC_STATUS);
    END(OK);
}
#ifndef OLD_DRIVER
typedef struct { unsigned version; unsigned long long counts[11]; unsigned exceeded; } Sram;
EXPORT int nvmlDeviceGetSramEccErrorStatus(Handle *h, Sram *to) {
    BEGIN(h); WHOLE(h);
    if (!to) END(INVALID_ARGUMENT);
    if (to->version != (sizeof(Sram) | 1u << 24)) END(VERSION_MISMATCH);
    memset(to->counts, 0, sizeof to->counts);
    to->exceeded = (unsigned)sign(h, SRAM);
    END(OK);
}
typedef struct { unsigned version; unsigned char cluster[16]; int status; unsigned clique; unsigned char state; unsigned health; } FabricV2;
typedef struct { unsigned version; unsigned char cluster[16]; int status; unsigned clique; unsigned char state; unsigned health; unsigned char summary; } FabricV3;
EXPORT int nvmlDeviceGetGpuFabricInfoV(Handle *h, void *to) {
    BEGIN(h); WHOLE(h);
    if (!to) END(INVALID_ARGUMENT);
    FabricV2 *v2 = to; FabricV3 *v3 = to;
    int newest = sign(h, FABRIC_VERSION) ? (int)sign(h, FABRIC_VERSION) : 3;
    int is3 = newest >= 3 && v3->version == (sizeof *v3 | 3u << 24);
    if (!is3 && v2->version != (sizeof *v2 | 2u << 24)) END(VERSION_MISMATCH);
    if (!sign(h, FABRIC_STATE)) END(NOT_SUPPORTED);
    memset(v2->cluster, 0, sizeof v2->cluster);
    v2->clique = 0; v2->state = (unsigned char)sign(h, FABRIC_STATE); v2->status = (int)sign(h, FABRIC_STATUS);
    v2->health = (unsigned)sign(h, FABRIC_HEALTH);
    if (is3) v3->summary = 0;
    END(OK);
}
EXPORT int nvmlDeviceGetCurrentClocksEventReasons(Handle *h, unsigned long long *to) {
    BEGIN(h); WHOLE(h);
    if (!to) END(INVALID_ARGUMENT);
    *to = sign(h, CLOCKS) | 1;   /* it idles */
    END(OK);
}
#else
EXPORT int nvmlDeviceGetCurrentClocksThrottleReasons(Handle *h, unsigned long long *to) {
    BEGIN(h); WHOLE(h);
    if (!to) END(INVALID_ARGUMENT);
    *to = sign(h, CLOCKS) | 1;
    END(OK);
}
#endif
typedef struct { unsigned field, scope; long long at, latency; int type, code; union { unsigned ui; unsigned long long ull; } value; } Field;
EXPORT int nvmlDeviceGetFieldValues(Handle *h, int count, Field *values) {
    enum { UNSIGNED_INT = 1, UNSIGNED_LONG_LONG = 3, CRC_FLIT_FIELD = 38, CRC_DATA_FIELD = 45, REPLAY_FIELD = 52,
           RECOVERY_FIELD = 59, ACTION_FIELD = 230 };
    BEGIN(h);
    if (count < 1 || !values) END(INVALID_ARGUMENT);
    for (int i = 0; i < count; i++) {
        Field *one = &values[i];
        int linked = sign(h, LINKS) != 0;
        one->code = OK; one->type = UNSIGNED_LONG_LONG; one->value.ull = 0;
        if (one->field == CRC_FLIT_FIELD && linked) one->value.ull = sign(h, CRC_FLIT);
        else if (one->field == CRC_DATA_FIELD && linked) one->value.ull = sign(h, CRC_DATA);
        else if (one->field == REPLAY_FIELD && linked) one->value.ull = sign(h, REPLAYS);
        else if (one->field == RECOVERY_FIELD && linked) one->value.ull = sign(h, RECOVERIES);
#ifndef OLD_DRIVER
        else if (one->field == ACTION_FIELD && whole(h)) { one->type = UNSIGNED_INT; one->value.ui = (unsigned)sign(h, RECOVERY); }
#endif
        else one->code = NOT_SUPPORTED;
    }
    END(OK);
}

typedef struct { Handle *device; unsigned long long type, data; unsigned gi, ci; } Event;
EXPORT int nvmlEventSetCreate(void **to) { if (!initialised) return UNINITIALIZED; *to = &set_made; return OK; }
EXPORT int nvmlEventSetFree(void *set) { return set == &set_made ? OK : INVALID_ARGUMENT; }
EXPORT int nvmlDeviceGetSupportedEventTypes(Handle *h, unsigned long long *to) { BEGIN(h); *to = 8; END(OK); }
EXPORT int nvmlDeviceRegisterEvents(Handle *h, unsigned long long types, void *set) {
    BEGIN(h);
    END(types == 8 && set == &set_made ? OK : INVALID_ARGUMENT);
}
EXPORT int nvmlEventSetWait_v2(void *set, Event *to, unsigned wait_ms) {
    if (set != &set_made) return INVALID_ARGUMENT;
    if (!getenv("FAKE_NVML_XIDS")) { usleep(wait_ms * 1000); return TIMEOUT; }
    for (unsigned waited = 0; waited < wait_ms; waited += 50) {
        BEGIN(NULL);
        if (now.errors) {
            Error one = now.error[0];
            memmove(now.error, now.error + 1, (size_t)--now.errors * sizeof one);
            save();
            *to = (Event){ &wholes[one.gpu], 8, one.code, (unsigned)one.gi, (unsigned)one.ci };
            END(OK);
        }
        unlock();
        usleep(50000);
    }
    return TIMEOUT;
}
