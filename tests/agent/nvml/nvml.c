/* A libnvidia-ml.so.1 over a simulated node: the calls that Token Factory uses, with NVML's own names,
 * structs and error codes, as the public documentation and the published bindings give them.
 *
 * The node is the file that TOKENFACTORY_NVML_STATE names when nvmlInit is called (sim.h).
 */
#define _GNU_SOURCE
#include "functions.h"
#include "sim.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4,
    NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15,
    NO_DATA = 21, ARGUMENT_VERSION_MISMATCH = 25, UNKNOWN = 999,
};
#define EXPORT __attribute__((visibility("default")))
#define NO_GPU (-1)
#define XID_EVENT 8ULL
#define RECOVERY_EVENT 0x8000ULL
#define EVENTS (XID_EVENT | RECOVERY_EVENT | 1ULL | 2ULL)
#define EVENT_SETS 32

struct handle {
    int gpu;
    int instance;   /* -1: the whole GPU */
};

struct event_set {
    int used;
    uint64_t seen;
    uint64_t types[SIM_GPUS];
};

static pthread_mutex_t init_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct sim_node *node;      /* stays mapped when shut down: another thread may hang inside */
static char node_path[4096];
static int references;
static uint32_t generation;
static struct handle whole[SIM_GPUS];
static struct handle slices[SIM_GPUS][SIM_INSTANCES];
static struct event_set sets[EVENT_SETS];

#define NAME(name) #name,
static const char *const names[] = {FUNCTIONS(NAME)};

EXPORT const char *sim_function_name(uint32_t function) { return function < F_COUNT ? names[function] : NULL; }

/* ---- entering and leaving a call ---- */

struct call {
    struct sim_node *node;
    struct sim_state *state;
    struct sim_gpu *gpu;
    int index;
    int instance;
    int dirty;
};

static struct sim_fault *fault_for(struct sim_state *s, int function, int gpu)
{
    for (int i = 0; i < SIM_FAULTS; i++) {
        struct sim_fault *f = &s->faults[i];
        if (f->active && f->remaining != 0 && (f->function < 0 || f->function == function)
            && (f->gpu < 0 || (gpu != NO_GPU && f->gpu == gpu)))
            return f;
    }
    return NULL;
}

/* Delays, hangs and injected errors, in that order. Called and left with the lock held. */
static int suffer(struct sim_node *n, struct sim_state *s, int function, int gpu)
{
    struct sim_fault *f = fault_for(s, function, gpu);
    if (f == NULL)
        return SUCCESS;
    int error = f->error;
    uint32_t delay = f->delay_us;
    int hang = f->hang != 0;
    if (f->remaining > 0)
        f->remaining--;
    if (delay > 0) {
        struct timespec ts = {delay / 1000000, (long)(delay % 1000000) * 1000};
        sim_unlock(n);
        nanosleep(&ts, NULL);
        sim_lock(n);
    }
    if (hang) {
        s->hanging++;
        while (f->active && f->hang) {
            uint32_t seen = s->wake;
            sim_unlock(n);
            sim_wait(n, seen, -1);
            sim_lock(n);
        }
        s->hanging--;
    }
    return error;
}

static int begin(struct call *c, int function, int gpu)
{
    pthread_mutex_lock(&init_mutex);
    struct sim_node *n = references > 0 ? node : NULL;
    uint32_t mine = generation;
    pthread_mutex_unlock(&init_mutex);
    if (n == NULL)
        return UNINITIALIZED;
    *c = (struct call){.node = n, .state = sim_lock(n), .index = gpu, .instance = -1};
    c->state->calls[function]++;
    int error = suffer(n, c->state, function, gpu);
    if (error == SUCCESS && !c->state->driver_loaded)
        error = DRIVER_NOT_LOADED;
    else if (error == SUCCESS && c->state->driver_generation != mine)
        error = (int)c->state->stale_error;
    if (error != SUCCESS)
        sim_unlock(n);
    return error;
}

static int leave(struct call *c, int result)
{
    if (c->dirty)
        sim_commit(c->node);
    else
        sim_unlock(c->node);
    return result;
}

static int begin_on(struct call *c, int function, const struct handle *h, int slice_allowed)
{
    const struct handle *first = whole, *slice = &slices[0][0];
    if (!(h >= first && h < first + SIM_GPUS) && !(h >= slice && h < slice + SIM_GPUS * SIM_INSTANCES))
        return INVALID_ARGUMENT;
    int error = begin(c, function, h->gpu);
    if (error != SUCCESS)
        return error;
    c->instance = h->instance;
    c->gpu = &c->state->gpus[h->gpu];
    if ((uint32_t)h->gpu >= c->state->gpu_count || !c->gpu->present)
        return leave(c, INVALID_ARGUMENT);
    if (c->gpu->lost)
        return leave(c, GPU_IS_LOST);
    if (h->instance >= 0 && ((uint32_t)h->instance >= c->gpu->instance_count || !c->gpu->mig_current))
        return leave(c, INVALID_ARGUMENT);
    if (h->instance >= 0 && !slice_allowed)
        return leave(c, NOT_SUPPORTED);
    return SUCCESS;
}

#define ENTER(fn, pointer) \
    struct call c; \
    if ((pointer) == NULL) \
        return INVALID_ARGUMENT; \
    int entered = begin(&c, F_##fn, NO_GPU); \
    if (entered != SUCCESS) \
        return entered

#define ENTER_ON(fn, handle, slice_allowed) \
    struct call c; \
    int entered = begin_on(&c, F_##fn, (handle), (slice_allowed)); \
    if (entered != SUCCESS) \
        return entered

static int may_write(const struct call *c)
{
    if (c->state->permission == SIM_ALLOW)
        return 1;
    return c->state->permission == SIM_BY_USER && geteuid() == 0;
}

static int text(struct call *c, char *to, unsigned length, const char *from)
{
    if (to == NULL)
        return leave(c, INVALID_ARGUMENT);
    if (strlen(from) + 1 > length)
        return leave(c, INSUFFICIENT_SIZE);
    strcpy(to, from);
    return leave(c, SUCCESS);
}

static int number(struct call *c, unsigned *to, unsigned value)
{
    if (to == NULL)
        return leave(c, INVALID_ARGUMENT);
    *to = value;
    return leave(c, SUCCESS);
}

static int64_t now(const struct call *c) { return sim_now(c->state); }

/* ---- library ---- */

static int join(struct sim_state *s)
{
    uint32_t me = (uint32_t)getpid();
    int room = -1;
    for (int i = 0; i < SIM_CLIENTS; i++) {
        if (s->clients[i] == me)
            return SUCCESS;
        if (s->clients[i] == 0)
            room = i;
    }
    if (room < 0)
        return UNKNOWN;
    s->clients[room] = me;
    return SUCCESS;
}

static int init(int function)
{
    const char *path = getenv("TOKENFACTORY_NVML_STATE");
    if (path == NULL)
        return DRIVER_NOT_LOADED;
    pthread_mutex_lock(&init_mutex);
    int result = SUCCESS;
    struct sim_node *opened = NULL;
    if (references > 0 || (node != NULL && strcmp(path, node_path) == 0))
        opened = node;
    else
        opened = sim_open(path);
    if (opened == NULL) {
        pthread_mutex_unlock(&init_mutex);
        return DRIVER_NOT_LOADED;
    }
    struct sim_state *s = sim_lock(opened);
    s->calls[function]++;
    result = suffer(opened, s, function, NO_GPU);
    if (result == SUCCESS && !s->driver_loaded)
        result = DRIVER_NOT_LOADED;
    if (result == SUCCESS)
        result = join(s);
    uint32_t current = s->driver_generation;
    sim_unlock(opened);
    node = opened;
    if (references == 0)
        snprintf(node_path, sizeof node_path, "%s", path);
    if (result == SUCCESS && references++ == 0) {
        generation = current;
        memset(sets, 0, sizeof sets);
        for (int i = 0; i < SIM_GPUS; i++) {
            whole[i] = (struct handle){i, -1};
            for (int j = 0; j < SIM_INSTANCES; j++)
                slices[i][j] = (struct handle){i, j};
        }
    }
    pthread_mutex_unlock(&init_mutex);
    return result;
}

EXPORT int nvmlInit_v2(void) { return init(F_nvmlInit_v2); }
EXPORT int nvmlInit(void) { return init(F_nvmlInit_v2); }
EXPORT int nvmlInitWithFlags(unsigned flags) { (void)flags; return init(F_nvmlInitWithFlags); }

EXPORT int nvmlShutdown(void)
{
    pthread_mutex_lock(&init_mutex);
    if (references == 0) {
        pthread_mutex_unlock(&init_mutex);
        return UNINITIALIZED;
    }
    if (--references == 0) {
        struct sim_state *s = sim_lock(node);
        s->calls[F_nvmlShutdown]++;
        for (int i = 0; i < SIM_CLIENTS; i++)
            if (s->clients[i] == (uint32_t)getpid())
                s->clients[i] = SIM_CLIENT_LEFT;
        sim_unlock(node);
        sim_lock(node);      /* notices that nobody is left */
        sim_commit(node);    /* and wakes who waits for events */
    }
    pthread_mutex_unlock(&init_mutex);
    return SUCCESS;
}

EXPORT const char *nvmlErrorString(int code)
{
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}

EXPORT int nvmlSystemGetDriverVersion(char *to, unsigned length)
{
    ENTER(nvmlSystemGetDriverVersion, to);
    return text(&c, to, length, c.state->driver_version);
}

EXPORT int nvmlSystemGetNVMLVersion(char *to, unsigned length)
{
    ENTER(nvmlSystemGetNVMLVersion, to);
    return text(&c, to, length, c.state->nvml_version);
}

EXPORT int nvmlSystemGetCudaDriverVersion(int *to)
{
    ENTER(nvmlSystemGetCudaDriverVersion, to);
    *to = (int)c.state->cuda_version;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *to)
{
    ENTER(nvmlSystemGetCudaDriverVersion_v2, to);
    *to = (int)c.state->cuda_version;
    return leave(&c, SUCCESS);
}

/* ---- which GPUs there are ---- */

EXPORT int nvmlDeviceGetCount_v2(unsigned *to)
{
    ENTER(nvmlDeviceGetCount_v2, to);
    unsigned count = 0;
    for (uint32_t i = 0; i < c.state->gpu_count; i++)
        count += c.state->gpus[i].present != 0;
    return number(&c, to, count);
}

static int found(struct call *c, int function, uint32_t i, struct handle **to)
{
    const struct sim_fault *own = fault_for(c->state, function, (int)i);
    int error = own != NULL && own->gpu >= 0 ? suffer(c->node, c->state, function, (int)i) : SUCCESS;
    if (error != SUCCESS)
        return leave(c, error);   /* a fault of every GPU was suffered on the way in */
    if (c->state->gpus[i].lost)
        return leave(c, GPU_IS_LOST);
    *to = &whole[i];
    return leave(c, SUCCESS);
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct handle **to)
{
    ENTER(nvmlDeviceGetHandleByIndex_v2, to);
    for (uint32_t i = 0; i < c.state->gpu_count; i++)
        if (c.state->gpus[i].present && index-- == 0)
            return found(&c, F_nvmlDeviceGetHandleByIndex_v2, i, to);
    return leave(&c, INVALID_ARGUMENT);
}

static void bus_id(const struct sim_gpu *gpu, char *to) { sprintf(to, "00000000:%02X:00.0", gpu->pci_bus & 0xff); }

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, struct handle **to)
{
    ENTER(nvmlDeviceGetHandleByUUID, to);
    for (uint32_t i = 0; uuid != NULL && i < c.state->gpu_count; i++) {
        struct sim_gpu *gpu = &c.state->gpus[i];
        if (!gpu->present)
            continue;
        if (strcmp(gpu->uuid, uuid) == 0)
            return found(&c, F_nvmlDeviceGetHandleByUUID, i, to);
        for (uint32_t j = 0; gpu->mig_current && j < gpu->instance_count; j++)
            if (strcmp(gpu->instances[j].uuid, uuid) == 0) {
                *to = &slices[i][j];
                return leave(&c, SUCCESS);
            }
    }
    return leave(&c, NOT_FOUND);
}

EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, struct handle **to)
{
    char own[32];
    ENTER(nvmlDeviceGetHandleByPciBusId_v2, to);
    for (uint32_t i = 0; bus != NULL && i < c.state->gpu_count; i++) {
        bus_id(&c.state->gpus[i], own);
        if (c.state->gpus[i].present && (strcasecmp(own, bus) == 0 || strcasecmp(own + 4, bus) == 0))
            return found(&c, F_nvmlDeviceGetHandleByPciBusId_v2, i, to);
    }
    return leave(&c, NOT_FOUND);
}

EXPORT int nvmlDeviceGetHandleBySerial(const char *serial, struct handle **to)
{
    ENTER(nvmlDeviceGetHandleBySerial, to);
    for (uint32_t i = 0; serial != NULL && i < c.state->gpu_count; i++)
        if (c.state->gpus[i].present && strcmp(c.state->gpus[i].serial, serial) == 0)
            return found(&c, F_nvmlDeviceGetHandleBySerial, i, to);
    return leave(&c, NOT_FOUND);
}

EXPORT int nvmlDeviceGetName(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetName, h, 1);
    char name[128];
    if (c.instance < 0)
        return text(&c, to, length, c.gpu->name);
    struct sim_instance *m = &c.gpu->instances[c.instance];
    snprintf(name, sizeof name, "%.90s MIG %ug.%ugb", c.gpu->name, m->slices, m->memory_mib / 1000);
    return text(&c, to, length, name);
}

EXPORT int nvmlDeviceGetUUID(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetUUID, h, 1);
    return text(&c, to, length, c.instance < 0 ? c.gpu->uuid : c.gpu->instances[c.instance].uuid);
}

EXPORT int nvmlDeviceGetSerial(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetSerial, h, 0);
    return text(&c, to, length, c.gpu->serial);
}

EXPORT int nvmlDeviceGetBoardPartNumber(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetBoardPartNumber, h, 0);
    return text(&c, to, length, c.gpu->part);
}

EXPORT int nvmlDeviceGetVbiosVersion(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetVbiosVersion, h, 0);
    return text(&c, to, length, c.gpu->vbios);
}

EXPORT int nvmlDeviceGetIndex(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetIndex, h, 0);
    unsigned place = 0;
    for (int i = 0; i < c.index; i++)
        place += c.state->gpus[i].present != 0;
    return number(&c, to, place);
}

EXPORT int nvmlDeviceGetMinorNumber(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetMinorNumber, h, 0);
    return number(&c, to, (unsigned)c.index);
}

EXPORT int nvmlDeviceGetModuleId(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetModuleId, h, 0);
    return number(&c, to, c.gpu->module);
}

EXPORT int nvmlDeviceGetArchitecture(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetArchitecture, h, 0);
    return number(&c, to, c.gpu->architecture);
}

EXPORT int nvmlDeviceGetBrand(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetBrand, h, 0);
    return number(&c, to, 14);
}

EXPORT int nvmlDeviceGetCudaComputeCapability(struct handle *h, int *major, int *minor)
{
    ENTER_ON(nvmlDeviceGetCudaComputeCapability, h, 1);
    *major = (int)c.gpu->compute_major;
    *minor = (int)c.gpu->compute_minor;
    return leave(&c, SUCCESS);
}

struct pci_info {
    char legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};

EXPORT int nvmlDeviceGetPciInfo_v3(struct handle *h, struct pci_info *to)
{
    ENTER_ON(nvmlDeviceGetPciInfo_v3, h, 0);
    memset(to, 0, sizeof *to);
    to->bus = c.gpu->pci_bus;
    to->pci_device_id = c.gpu->pci_device_id;
    bus_id(c.gpu, to->bus_id);
    memcpy(to->legacy, to->bus_id + 4, strlen(to->bus_id + 4));
    return leave(&c, SUCCESS);
}

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

EXPORT int nvmlDeviceGetMemoryInfo(struct handle *h, struct memory *to)
{
    ENTER_ON(nvmlDeviceGetMemoryInfo, h, 1);
    uint32_t total = c.instance < 0 ? c.gpu->memory_mib : c.gpu->instances[c.instance].memory_mib;
    uint32_t used = c.instance < 0 ? c.gpu->used_mib : 0;
    *to = (struct memory){(uint64_t)total << 20, (uint64_t)(total - used) << 20, (uint64_t)used << 20};
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(struct handle *h, struct memory_v2 *to)
{
    ENTER_ON(nvmlDeviceGetMemoryInfo_v2, h, 1);
    if (to->version != 0x02000028)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    uint32_t total = c.instance < 0 ? c.gpu->memory_mib : c.gpu->instances[c.instance].memory_mib;
    uint32_t used = c.instance < 0 ? c.gpu->used_mib : 0;
    to->total = (uint64_t)total << 20;
    to->used = (uint64_t)used << 20;
    to->free = to->total - to->used;
    to->reserved = 0;
    return leave(&c, SUCCESS);
}

struct platform {
    unsigned version;
    uint8_t ib_guid[16], chassis[16], slot, tray, host, peer, module;
};

EXPORT int nvmlDeviceGetPlatformInfo(struct handle *h, struct platform *to)
{
    ENTER_ON(nvmlDeviceGetPlatformInfo, h, 0);
    if (!c.gpu->has_platform)
        return leave(&c, NOT_SUPPORTED);
    if (to->version != 0x200002c)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    memset(to->ib_guid, 0, sizeof to->ib_guid);
    memcpy(to->chassis, c.gpu->chassis_serial, sizeof to->chassis);
    to->slot = (uint8_t)c.gpu->slot;
    to->tray = (uint8_t)c.gpu->tray;
    to->host = (uint8_t)c.gpu->host;
    to->peer = 0;
    to->module = (uint8_t)c.gpu->module;
    return leave(&c, SUCCESS);
}

/* ---- power ---- */

EXPORT int nvmlDeviceGetPowerManagementMode(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetPowerManagementMode, h, 0);
    return number(&c, to, c.gpu->limits_supported != 0);
}

#define LIMIT(fn, value) \
    EXPORT int fn(struct handle *h, unsigned *to) \
    { \
        ENTER_ON(fn, h, 0); \
        if (!c.gpu->limits_supported) \
            return leave(&c, NOT_SUPPORTED); \
        return number(&c, to, (value)); \
    }

LIMIT(nvmlDeviceGetPowerManagementLimit, c.gpu->requested_mw)
LIMIT(nvmlDeviceGetPowerManagementDefaultLimit, c.gpu->default_mw)
LIMIT(nvmlDeviceGetEnforcedPowerLimit, sim_enforced_mw(c.gpu))

EXPORT int nvmlDeviceGetPowerManagementLimitConstraints(struct handle *h, unsigned *least, unsigned *most)
{
    ENTER_ON(nvmlDeviceGetPowerManagementLimitConstraints, h, 0);
    if (!c.gpu->limits_supported)
        return leave(&c, NOT_SUPPORTED);
    *least = c.gpu->min_mw;
    *most = c.gpu->max_mw;
    return leave(&c, SUCCESS);
}

static int set_limit(struct call *c, unsigned scope, unsigned mw)
{
    struct sim_gpu *gpu = c->gpu;
    if (scope > 1 || !gpu->limits_supported || (scope == 1 && gpu->module_max_mw == 0))
        return leave(c, NOT_SUPPORTED);
    if (!may_write(c))
        return leave(c, NO_PERMISSION);
    uint32_t least = scope == 1 ? gpu->module_min_mw : gpu->min_mw;
    uint32_t most = scope == 1 ? gpu->module_max_mw : gpu->max_mw;
    if (mw < least || mw > most)
        return leave(c, INVALID_ARGUMENT);
    c->state->limit_writes[c->index]++;
    if (gpu->ignore_limit_writes)
        return leave(c, SUCCESS);
    c->dirty = 1;
    if (scope == 0) {
        gpu->requested_mw = mw;
        return leave(c, SUCCESS);
    }
    for (uint32_t i = 0; i < c->state->gpu_count; i++)   /* one limit, seen from each GPU of the module */
        if (c->state->gpus[i].module == gpu->module)
            c->state->gpus[i].module_requested_mw = mw;
    return leave(c, SUCCESS);
}

EXPORT int nvmlDeviceSetPowerManagementLimit(struct handle *h, unsigned mw)
{
    ENTER_ON(nvmlDeviceSetPowerManagementLimit, h, 0);
    return set_limit(&c, 0, mw);
}

struct power_value { unsigned version, scope, mw; };

EXPORT int nvmlDeviceSetPowerManagementLimit_v2(struct handle *h, const struct power_value *value)
{
    ENTER_ON(nvmlDeviceSetPowerManagementLimit_v2, h, 0);
    if (value->version != 0x0200000C)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    return set_limit(&c, value->scope, value->mw);
}

static double module_watts(const struct call *c, double (*of)(const struct sim_gpu *, int64_t))
{
    double sum = c->gpu->module_other_watts;
    for (uint32_t i = 0; i < c->state->gpu_count; i++)
        if (c->state->gpus[i].module == c->gpu->module)
            sum += c->state->gpus[i].sensor_gain * of(&c->state->gpus[i], now(c));
    return sum;
}

static unsigned average_mw(const struct call *c)
{
    return (unsigned)(1000.0 * c->gpu->sensor_gain * sim_average_watts(c->gpu, now(c)));
}

static uint64_t energy_mj(const struct call *c)
{
    double joules = sim_energy_joules(c->gpu, now(c)) - c->gpu->energy_base_joules;
    return (uint64_t)(1000.0 * c->gpu->sensor_gain * joules);
}

EXPORT int nvmlDeviceGetPowerUsage(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetPowerUsage, h, 0);
    return number(&c, to, average_mw(&c));
}

EXPORT int nvmlDeviceGetTotalEnergyConsumption(struct handle *h, unsigned long long *to)
{
    ENTER_ON(nvmlDeviceGetTotalEnergyConsumption, h, 0);
    *to = energy_mj(&c);
    return leave(&c, SUCCESS);
}

struct field_value {
    uint32_t field, scope;
    int64_t timestamp, latency_us;
    uint32_t type;
    int32_t result;
    union { double d; unsigned ui; unsigned long ul; unsigned long long ull; long long sll; } value;
};

static int put(struct field_value *v, int wide, uint64_t value)
{
    v->value.ull = 0;
    v->type = wide ? 3 : 1;
    if (wide)
        v->value.ull = value;
    else
        v->value.ui = (unsigned)value;
    return SUCCESS;
}

static int module_field(const struct call *c, struct field_value *v)
{
    if (c->gpu->module_max_mw == 0)
        return NOT_SUPPORTED;
    switch (v->field) {
    case 185: return put(v, 0, (uint64_t)(1000.0 * module_watts(c, sim_average_watts)));
    case 186: return put(v, 0, (uint64_t)(1000.0 * module_watts(c, sim_power_watts)));
    case 187: return put(v, 0, c->gpu->module_min_mw);
    case 188: return put(v, 0, c->gpu->module_max_mw);
    case 189: return put(v, 0, c->gpu->module_default_mw);
    case 190: case 192: return put(v, 0, c->gpu->module_requested_mw);
    default: return NOT_SUPPORTED;
    }
}

static int field(const struct call *c, struct field_value *v)
{
    const struct sim_gpu *gpu = c->gpu;
    unsigned id = v->field;
    if (v->scope == 1 && id >= 185 && id <= 192)
        return module_field(c, v);
    if (v->scope == 2 && id >= 185 && id <= 192)
        return gpu->memory_scope_mw && id <= 186 ? put(v, 0, gpu->memory_scope_mw) : NOT_SUPPORTED;
    if (id >= 187 && id <= 192 && id != 191 && !gpu->limits_supported)
        return NOT_SUPPORTED;
    switch (id) {
    case 74: return put(v, 1, gpu->power_cap_ns);
    case 82: return put(v, 0, (uint64_t)sim_celsius(gpu, now(c)) + 6);
    case 83: case 191: return put(v, 1, energy_mj(c));
    case 91: return put(v, 0, gpu->link_count);
    case 142: return put(v, 0, gpu->remap_correctable);
    case 143: return put(v, 0, gpu->remap_uncorrectable);
    case 144: return put(v, 0, gpu->remap_pending);
    case 145: return put(v, 0, gpu->remap_failure);
    case 185: return put(v, 0, average_mw(c));
    case 186: return put(v, 0, (uint64_t)(1000.0 * gpu->sensor_gain * sim_power_watts(gpu, now(c))));
    case 187: return put(v, 0, gpu->min_mw);
    case 188: return put(v, 0, gpu->max_mw);
    case 189: return put(v, 0, gpu->default_mw);
    case 190: return put(v, 0, sim_enforced_mw(gpu));
    case 192: return put(v, 0, gpu->requested_mw);
    case 230: return put(v, 0, gpu->recovery_action);
    case 270: return put(v, 1, gpu->thermal_ns);
    case 271: return put(v, 1, gpu->power_brake_ns);
    default: return NOT_SUPPORTED;
    }
}

EXPORT int nvmlDeviceGetFieldValues(struct handle *h, int count, struct field_value *values)
{
    ENTER_ON(nvmlDeviceGetFieldValues, h, 0);
    for (int i = 0; i < count; i++) {
        values[i].timestamp = now(&c) / 1000;
        values[i].latency_us = 0;
        values[i].result = field(&c, &values[i]);
    }
    return leave(&c, SUCCESS);
}

/* ---- temperature, clocks, why they are lowered ---- */

EXPORT int nvmlDeviceGetTemperature(struct handle *h, unsigned sensor, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetTemperature, h, 0);
    if (sensor != 0)
        return leave(&c, INVALID_ARGUMENT);
    return number(&c, to, (unsigned)sim_celsius(c.gpu, now(&c)));
}

struct temperature { unsigned version, sensor; int celsius; };

EXPORT int nvmlDeviceGetTemperatureV(struct handle *h, struct temperature *to)
{
    ENTER_ON(nvmlDeviceGetTemperatureV, h, 0);
    if (to->version != 0x100000C)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    if (to->sensor != 0)
        return leave(&c, INVALID_ARGUMENT);
    to->celsius = (int)sim_celsius(c.gpu, now(&c));
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetTemperatureThreshold(struct handle *h, unsigned which, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetTemperatureThreshold, h, 0);
    if (which > 1)
        return leave(&c, NOT_SUPPORTED);
    return number(&c, to, which == 0 ? c.gpu->shutdown_celsius : c.gpu->slowdown_celsius);
}

struct utilization { unsigned gpu, memory; };

EXPORT int nvmlDeviceGetUtilizationRates(struct handle *h, struct utilization *to)
{
    ENTER_ON(nvmlDeviceGetUtilizationRates, h, 0);
    if (c.gpu->mig_current)
        return leave(&c, NOT_SUPPORTED);
    double span = c.gpu->full_watts - c.gpu->idle_watts;
    double busy = c.gpu->demand_watts >= 0 ? (c.gpu->demand_watts - c.gpu->idle_watts) / span : c.gpu->load;
    busy = busy < 0 ? 0 : busy > 1 ? 1 : busy;
    to->gpu = busy > 0 ? (unsigned)(100.0 * busy + 0.5) : 0;
    to->memory = to->gpu / 2;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetPerformanceState(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetPerformanceState, h, 0);
    return number(&c, to, 0);
}

static int max_clock(const struct sim_gpu *gpu, unsigned which, unsigned *mhz)
{
    *mhz = which == 2 ? gpu->max_memory_mhz : gpu->max_sm_mhz;
    return which <= 3;
}

EXPORT int nvmlDeviceGetClockInfo(struct handle *h, unsigned which, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetClockInfo, h, 0);
    unsigned mhz;
    if (!max_clock(c.gpu, which, &mhz))
        return leave(&c, INVALID_ARGUMENT);
    if (which != 2) {
        if (c.gpu->locked_max_mhz != 0 && c.gpu->locked_max_mhz < mhz)
            mhz = c.gpu->locked_max_mhz;
        mhz = (unsigned)(mhz * sim_clock_share(c.gpu));
    }
    return number(&c, to, mhz);
}

EXPORT int nvmlDeviceGetMaxClockInfo(struct handle *h, unsigned which, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetMaxClockInfo, h, 0);
    unsigned mhz;
    if (!max_clock(c.gpu, which, &mhz))
        return leave(&c, INVALID_ARGUMENT);
    return number(&c, to, mhz);
}

EXPORT int nvmlDeviceSetGpuLockedClocks(struct handle *h, unsigned least, unsigned most)
{
    ENTER_ON(nvmlDeviceSetGpuLockedClocks, h, 0);
    if (!may_write(&c))
        return leave(&c, NO_PERMISSION);
    if (least > most || most > c.gpu->max_sm_mhz)
        return leave(&c, INVALID_ARGUMENT);
    c.gpu->locked_min_mhz = least;
    c.gpu->locked_max_mhz = most;
    c.dirty = 1;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceResetGpuLockedClocks(struct handle *h)
{
    ENTER_ON(nvmlDeviceResetGpuLockedClocks, h, 0);
    if (!may_write(&c))
        return leave(&c, NO_PERMISSION);
    c.gpu->locked_min_mhz = c.gpu->locked_max_mhz = 0;
    c.dirty = 1;
    return leave(&c, SUCCESS);
}

#define REASONS(fn, value) \
    EXPORT int fn(struct handle *h, unsigned long long *to) \
    { \
        ENTER_ON(fn, h, 0); \
        *to = (value); \
        return leave(&c, SUCCESS); \
    }

REASONS(nvmlDeviceGetCurrentClocksEventReasons, c.gpu->reasons)
REASONS(nvmlDeviceGetCurrentClocksThrottleReasons, c.gpu->reasons)
REASONS(nvmlDeviceGetSupportedClocksEventReasons, 0x1ff)
REASONS(nvmlDeviceGetSupportedClocksThrottleReasons, 0x1ff)

struct violation { unsigned long long reference_us, violation_ns; };

EXPORT int nvmlDeviceGetViolationStatus(struct handle *h, unsigned policy, struct violation *to)
{
    ENTER_ON(nvmlDeviceGetViolationStatus, h, 0);
    if (policy > 1)
        return leave(&c, NOT_SUPPORTED);
    to->reference_us = (uint64_t)now(&c) / 1000;
    to->violation_ns = policy == 0 ? c.gpu->power_cap_ns : c.gpu->thermal_ns;
    return leave(&c, SUCCESS);
}

/* ---- memory errors, persistence, processes ---- */

EXPORT int nvmlDeviceGetEccMode(struct handle *h, unsigned *current, unsigned *pending)
{
    ENTER_ON(nvmlDeviceGetEccMode, h, 0);
    if (!c.gpu->ecc_supported)
        return leave(&c, NOT_SUPPORTED);
    *current = *pending = 1;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetTotalEccErrors(struct handle *h, unsigned type, unsigned counter, unsigned long long *to)
{
    ENTER_ON(nvmlDeviceGetTotalEccErrors, h, 0);
    if (!c.gpu->ecc_supported)
        return leave(&c, NOT_SUPPORTED);
    if (type > 1 || counter > 1)
        return leave(&c, INVALID_ARGUMENT);
    *to = counter == 0 ? (type == 0 ? c.gpu->ecc_volatile_corrected : c.gpu->ecc_volatile_uncorrected)
                       : (type == 0 ? c.gpu->ecc_aggregate_corrected : c.gpu->ecc_aggregate_uncorrected);
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetRemappedRows(struct handle *h, unsigned *correctable, unsigned *uncorrectable,
                                     unsigned *pending, unsigned *failure)
{
    ENTER_ON(nvmlDeviceGetRemappedRows, h, 0);
    if (!c.gpu->ecc_supported || c.gpu->mig_current)
        return leave(&c, NOT_SUPPORTED);
    *correctable = c.gpu->remap_correctable;
    *uncorrectable = c.gpu->remap_uncorrectable;
    *pending = c.gpu->remap_pending;
    *failure = c.gpu->remap_failure;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetPersistenceMode(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetPersistenceMode, h, 0);
    return number(&c, to, c.gpu->persistence);
}

EXPORT int nvmlDeviceSetPersistenceMode(struct handle *h, unsigned mode)
{
    ENTER_ON(nvmlDeviceSetPersistenceMode, h, 0);
    if (!may_write(&c))
        return leave(&c, NO_PERMISSION);
    c.gpu->persistence = mode != 0;
    return leave(&c, SUCCESS);
}

struct process { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; };

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(struct handle *h, unsigned *count, struct process *to)
{
    ENTER_ON(nvmlDeviceGetComputeRunningProcesses_v3, h, 1);
    unsigned room = *count;
    *count = c.gpu->process_count;
    if (*count == 0)
        return leave(&c, SUCCESS);
    if (to == NULL || room < *count)
        return leave(&c, INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < *count; i++) {
        struct sim_process *p = &c.gpu->processes[i];
        to[i] = (struct process){p->pid, (uint64_t)p->memory_mib << 20, 0xffffffffu, 0xffffffffu};
    }
    return leave(&c, SUCCESS);
}

/* ---- events ---- */

EXPORT int nvmlDeviceGetSupportedEventTypes(struct handle *h, unsigned long long *to)
{
    ENTER_ON(nvmlDeviceGetSupportedEventTypes, h, 0);
    *to = EVENTS;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlEventSetCreate(struct event_set **to)
{
    ENTER(nvmlEventSetCreate, to);
    for (int i = 0; i < EVENT_SETS; i++)
        if (!sets[i].used) {
            sets[i] = (struct event_set){.used = 1, .seen = c.state->event_count};
            *to = &sets[i];
            return leave(&c, SUCCESS);
        }
    return leave(&c, UNKNOWN);
}

EXPORT int nvmlDeviceRegisterEvents(struct handle *h, unsigned long long types, struct event_set *set)
{
    ENTER_ON(nvmlDeviceRegisterEvents, h, 0);
    if (set == NULL || !set->used)
        return leave(&c, INVALID_ARGUMENT);
    if (types & ~EVENTS)
        return leave(&c, NOT_SUPPORTED);
    set->types[c.index] |= types;
    return leave(&c, SUCCESS);
}

struct event_data {
    struct handle *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
};

/* The next event of this set; GPU_IS_LOST when one of its GPUs is; TIMEOUT when there is none yet. */
static int next_event(struct call *c, struct event_set *set, struct event_data *to)
{
    struct sim_state *s = c->state;
    if (s->event_count > set->seen + SIM_EVENTS)
        set->seen = s->event_count - SIM_EVENTS;   /* too slow: the oldest are gone */
    while (set->seen < s->event_count) {
        const struct sim_event *e = &s->events[set->seen++ % SIM_EVENTS];
        if (e->gpu < 0 || e->gpu >= SIM_GPUS || !(set->types[e->gpu] & e->type))
            continue;
        *to = (struct event_data){&whole[e->gpu], e->type, e->data, e->gpu_instance, e->compute_instance};
        return SUCCESS;
    }
    for (uint32_t i = 0; i < s->gpu_count; i++)
        if (set->types[i] && s->gpus[i].lost)
            return GPU_IS_LOST;
    return TIMEOUT;
}

static int64_t monotonic_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

EXPORT int nvmlEventSetWait_v2(struct event_set *set, struct event_data *to, unsigned timeout_ms)
{
    if (set < sets || set >= sets + EVENT_SETS || !set->used)
        return INVALID_ARGUMENT;
    int64_t until = monotonic_ns() + (int64_t)timeout_ms * 1000000;   /* real time, even on a virtual clock */
    ENTER(nvmlEventSetWait_v2, to);
    for (;;) {
        int result = next_event(&c, set, to);
        int64_t left = until - monotonic_ns();
        if (result != TIMEOUT || left <= 0)
            return leave(&c, result);
        uint32_t seen = c.state->wake;
        leave(&c, SUCCESS);
        sim_wait(c.node, seen, left);
        int error = begin(&c, F_nvmlEventSetWait_v2, NO_GPU);
        if (error != SUCCESS)
            return error;
        c.state->calls[F_nvmlEventSetWait_v2]--;   /* still the same call */
    }
}

EXPORT int nvmlEventSetFree(struct event_set *set)
{
    ENTER(nvmlEventSetFree, set);
    set->used = 0;
    return leave(&c, SUCCESS);
}

/* ---- MIG ---- */

EXPORT int nvmlDeviceGetMigMode(struct handle *h, unsigned *current, unsigned *pending)
{
    ENTER_ON(nvmlDeviceGetMigMode, h, 0);
    if (!c.gpu->mig_supported)
        return leave(&c, NOT_SUPPORTED);
    *current = c.gpu->mig_current;
    *pending = c.gpu->mig_pending;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetMaxMigDeviceCount(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetMaxMigDeviceCount, h, 0);
    return number(&c, to, c.gpu->mig_supported ? 7 : 0);
}

EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(struct handle *h, unsigned index, struct handle **to)
{
    ENTER_ON(nvmlDeviceGetMigDeviceHandleByIndex, h, 0);
    if (!c.gpu->mig_current || index >= c.gpu->instance_count)
        return leave(&c, index >= 7 ? INVALID_ARGUMENT : NOT_FOUND);
    *to = &slices[c.index][index];
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(struct handle *h, struct handle **to)
{
    ENTER_ON(nvmlDeviceGetDeviceHandleFromMigDeviceHandle, h, 1);
    if (c.instance < 0)
        return leave(&c, INVALID_ARGUMENT);
    *to = &whole[c.index];
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceIsMigDeviceHandle(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceIsMigDeviceHandle, h, 1);
    return number(&c, to, c.instance >= 0);
}

EXPORT int nvmlDeviceGetGpuInstanceId(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetGpuInstanceId, h, 1);
    if (c.instance < 0)
        return leave(&c, NOT_SUPPORTED);
    return number(&c, to, c.gpu->instances[c.instance].gpu_instance);
}

EXPORT int nvmlDeviceGetComputeInstanceId(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetComputeInstanceId, h, 1);
    if (c.instance < 0)
        return leave(&c, NOT_SUPPORTED);
    return number(&c, to, c.gpu->instances[c.instance].compute_instance);
}

/* ---- NVLink and the fabric ---- */

EXPORT int nvmlDeviceGetNvLinkState(struct handle *h, unsigned link, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetNvLinkState, h, 0);
    if (link >= c.gpu->link_count)
        return leave(&c, c.gpu->link_count ? INVALID_ARGUMENT : NOT_SUPPORTED);
    return number(&c, to, c.gpu->link_up[link]);
}

EXPORT int nvmlDeviceGetNvLinkVersion(struct handle *h, unsigned link, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetNvLinkVersion, h, 0);
    if (link >= c.gpu->link_count)
        return leave(&c, c.gpu->link_count ? INVALID_ARGUMENT : NOT_SUPPORTED);
    return number(&c, to, c.gpu->link_version);
}

EXPORT int nvmlDeviceGetNvLinkErrorCounter(struct handle *h, unsigned link, unsigned counter,
                                           unsigned long long *to)
{
    ENTER_ON(nvmlDeviceGetNvLinkErrorCounter, h, 0);
    if (link >= c.gpu->link_count || counter > 4)
        return leave(&c, c.gpu->link_count ? INVALID_ARGUMENT : NOT_SUPPORTED);
    *to = counter == 0 ? c.gpu->link_errors[link] : 0;
    return leave(&c, SUCCESS);
}

struct fabric { uint8_t cluster[16]; int32_t status; uint32_t clique, state; };
struct fabric_v { uint32_t version; struct fabric info; uint32_t health_mask; uint8_t summary; };

static struct fabric fabric_of(const struct sim_gpu *gpu)
{
    struct fabric info = {.status = (int32_t)gpu->fabric_status, .clique = gpu->fabric_clique,
                          .state = gpu->fabric_state};
    memcpy(info.cluster, gpu->fabric_cluster, sizeof info.cluster);
    return info;
}

EXPORT int nvmlDeviceGetGpuFabricInfo(struct handle *h, struct fabric *to)
{
    ENTER_ON(nvmlDeviceGetGpuFabricInfo, h, 0);
    *to = fabric_of(c.gpu);
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetGpuFabricInfoV(struct handle *h, struct fabric_v *to)
{
    ENTER_ON(nvmlDeviceGetGpuFabricInfoV, h, 0);
    if (to->version != 0x02000024 && to->version != 0x3000028)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    to->info = fabric_of(c.gpu);
    to->health_mask = c.gpu->fabric_health_mask;
    if (to->version == 0x3000028)
        to->summary = (uint8_t)c.gpu->fabric_summary;
    return leave(&c, SUCCESS);
}

/* ---- workload power profiles ---- */

struct profile { uint32_t version, id, priority, conflicts[SIM_MASK]; };
struct profiles { uint32_t version, mask[SIM_MASK]; struct profile profile[255]; };
struct current_profiles { uint32_t version, supported[SIM_MASK], requested[SIM_MASK], enforced[SIM_MASK]; };
struct requested_profiles { uint32_t version, mask[SIM_MASK]; };
struct update_profiles { uint32_t operation, mask[SIM_MASK]; };

static int has_profiles(const struct sim_gpu *gpu)
{
    for (int i = 0; i < SIM_MASK; i++)
        if (gpu->profiles_supported[i])
            return 1;
    return 0;
}

EXPORT int nvmlDeviceWorkloadPowerProfileGetProfilesInfo(struct handle *h, struct profiles *to)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileGetProfilesInfo, h, 0);
    if (!has_profiles(c.gpu))
        return leave(&c, NOT_SUPPORTED);
    if (to->version != 0x1002bf8)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    memset(to->mask, 0, sizeof *to - sizeof to->version);
    memcpy(to->mask, c.gpu->profiles_supported, sizeof to->mask);
    for (uint32_t i = 0; i < 255; i++)
        if (to->mask[i / 32] >> (i % 32) & 1)
            to->profile[i] = (struct profile){.version = 0x100002c, .id = i, .priority = i};
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceWorkloadPowerProfileGetCurrentProfiles(struct handle *h, struct current_profiles *to)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileGetCurrentProfiles, h, 0);
    if (!has_profiles(c.gpu))
        return leave(&c, NOT_SUPPORTED);
    if (to->version != 0x1000064)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    memcpy(to->supported, c.gpu->profiles_supported, sizeof to->supported);
    memcpy(to->requested, c.gpu->profiles_requested, sizeof to->requested);
    memcpy(to->enforced, c.gpu->profiles_requested, sizeof to->enforced);
    return leave(&c, SUCCESS);
}

static int update(struct call *c, unsigned operation, const uint32_t *mask)
{
    if (!has_profiles(c->gpu))
        return leave(c, NOT_SUPPORTED);
    if (!may_write(c))
        return leave(c, NO_PERMISSION);
    for (int i = 0; i < SIM_MASK; i++)
        if (mask[i] & ~c->gpu->profiles_supported[i])
            return leave(c, INVALID_ARGUMENT);
    if (operation > 2)
        return leave(c, INVALID_ARGUMENT);
    for (int i = 0; i < SIM_MASK; i++) {
        uint32_t *now_set = &c->gpu->profiles_requested[i];
        if (operation == 0 && !c->gpu->ignore_profile_clear)
            *now_set &= ~mask[i];
        else if (operation == 1)
            *now_set |= mask[i];
        else if (operation == 2)
            *now_set = mask[i];
    }
    c->dirty = 1;
    return leave(c, SUCCESS);
}

EXPORT int nvmlDeviceWorkloadPowerProfileSetRequestedProfiles(struct handle *h,
                                                              const struct requested_profiles *wanted)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileSetRequestedProfiles, h, 0);
    if (wanted->version != 0x1000024)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    return update(&c, 1, wanted->mask);
}

EXPORT int nvmlDeviceWorkloadPowerProfileClearRequestedProfiles(struct handle *h,
                                                                const struct requested_profiles *wanted)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileClearRequestedProfiles, h, 0);
    if (wanted->version != 0x1000024)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    return update(&c, 0, wanted->mask);
}

EXPORT int nvmlDeviceWorkloadPowerProfileUpdateProfiles_v1(struct handle *h, const struct update_profiles *wanted)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileUpdateProfiles_v1, h, 0);
    return update(&c, wanted->operation, wanted->mask);
}
