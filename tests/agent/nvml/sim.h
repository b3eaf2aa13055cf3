/* The state of one simulated node: a file that the library maps and that a test or the demo maps too.
 *
 * operator/tokenfactory/twin/nvml.py reads the structs below to build its view of the file, so each
 * field is one line `type name;` or `type name[N];`, N a number or a #define of this file, and the
 * types are those of the table there. SIM_LAYOUT changes when the meaning of a field does.
 */
#ifndef SIM_H
#define SIM_H

#include <stdint.h>

#define SIM_MAGIC 0x544f4b46
#define SIM_LAYOUT 2
#define SIM_GPUS 16
#define SIM_LINKS 36
#define SIM_INSTANCES 8
#define SIM_SEGMENTS 64
#define SIM_EVENTS 256
#define SIM_FAULTS 32
#define SIM_CLIENTS 32
#define SIM_FUNCTIONS 128
#define SIM_PROCESSES 8
#define SIM_MASK 8

/* From start_ns on, power goes from start_watts towards target_watts with the GPU's time constant. */
struct sim_segment {
    int64_t start_ns;
    double start_watts;
    double target_watts;
    double start_joules;
};

struct sim_instance {
    uint32_t gpu_instance;
    uint32_t compute_instance;
    uint32_t slices;
    uint32_t memory_mib;
    char uuid[96];
};

struct sim_process {
    uint32_t pid;
    uint32_t memory_mib;
};

struct sim_gpu {
    /* what it is */
    char name[96];
    char uuid[96];
    char serial[32];
    char part[80];
    char vbios[32];
    uint32_t architecture;
    uint32_t compute_major;
    uint32_t compute_minor;
    uint32_t pci_bus;
    uint32_t pci_device_id;
    uint32_t module;
    uint32_t memory_mib;
    uint32_t used_mib;
    /* health */
    uint32_t present;
    uint32_t lost;
    uint32_t persistence;
    uint32_t recovery_action;
    uint32_t ecc_supported;
    uint32_t remap_correctable;
    uint32_t remap_uncorrectable;
    uint32_t remap_pending;
    uint32_t remap_failure;
    uint64_t ecc_volatile_corrected;
    uint64_t ecc_volatile_uncorrected;
    uint64_t ecc_aggregate_corrected;
    uint64_t ecc_aggregate_uncorrected;
    /* limits, in milliwatts; 0 in out_of_band_mw: none */
    uint32_t min_mw;
    uint32_t max_mw;
    uint32_t default_mw;
    uint32_t requested_mw;
    uint32_t out_of_band_mw;
    uint32_t module_min_mw;
    uint32_t module_max_mw;
    uint32_t module_default_mw;
    uint32_t module_requested_mw;
    uint32_t memory_scope_mw;
    uint32_t limits_supported;
    uint32_t ignore_limit_writes;
    /* what it draws: demand_watts where it is not negative, else idle_watts + load * (full - idle) */
    double idle_watts;
    double full_watts;
    double module_other_watts;
    double tau_seconds;
    double sensor_gain;
    double load;
    double demand_watts;
    double energy_base_joules;
    int64_t settled_ns;
    uint64_t segment_count;
    struct sim_segment segments[SIM_SEGMENTS];
    /* why its clocks are lowered: reasons is computed, forced_reasons added by the driver */
    uint64_t reasons;
    uint64_t forced_reasons;
    uint64_t power_cap_ns;
    uint64_t power_brake_ns;
    uint64_t thermal_ns;
    double ambient_celsius;
    double celsius_per_watt;
    double forced_celsius;
    uint32_t slowdown_celsius;
    uint32_t shutdown_celsius;
    uint32_t max_sm_mhz;
    uint32_t max_memory_mhz;
    uint32_t locked_min_mhz;
    uint32_t locked_max_mhz;
    /* workload power profiles: bit masks */
    uint32_t profiles_supported[SIM_MASK];
    uint32_t profiles_requested[SIM_MASK];
    uint32_t ignore_profile_clear;
    /* MIG, NVLink, fabric */
    uint32_t mig_supported;
    uint32_t mig_current;
    uint32_t mig_pending;
    uint32_t instance_count;
    struct sim_instance instances[SIM_INSTANCES];
    uint32_t link_count;
    uint32_t link_version;
    uint32_t link_up[SIM_LINKS];
    uint64_t link_errors[SIM_LINKS];
    uint32_t fabric_state;
    uint32_t fabric_status;
    uint32_t fabric_clique;
    uint32_t fabric_health_mask;
    uint32_t fabric_summary;
    uint8_t fabric_cluster[16];
    uint32_t has_platform;
    char chassis_serial[16];
    uint32_t slot;
    uint32_t tray;
    uint32_t host;
    uint32_t process_count;
    struct sim_process processes[SIM_PROCESSES];
};

/* One failure of one function (function < 0: of every one) on one GPU (gpu < 0: on every one), for the
 * next `remaining` calls (< 0: for all). A call that hangs goes on when active is cleared. */
struct sim_fault {
    uint32_t active;
    int32_t function;
    int32_t gpu;
    int32_t error;
    uint32_t hang;
    uint32_t delay_us;
    int32_t remaining;
};

struct sim_event {
    uint64_t type;
    uint64_t data;
    int32_t gpu;
    uint32_t gpu_instance;
    uint32_t compute_instance;
};

struct sim_state {
    uint32_t magic;
    uint32_t layout;
    uint32_t gpu_count;
    uint32_t driver_loaded;
    uint32_t driver_generation;
    uint32_t stale_error;
    uint32_t permission;
    uint32_t clock_virtual;
    int64_t virtual_ns;
    char driver_version[80];
    char nvml_version[80];
    uint32_t cuda_version;
    uint32_t wake;
    uint32_t hanging;
    uint32_t clients[SIM_CLIENTS];
    uint64_t calls[SIM_FUNCTIONS];
    uint64_t limit_writes[SIM_GPUS];
    int64_t limit_set_ns[SIM_GPUS];   /* when the last of them was accepted, on this node's clock */
    struct sim_fault faults[SIM_FAULTS];
    uint64_t event_count;
    struct sim_event events[SIM_EVENTS];
    struct sim_gpu gpus[SIM_GPUS];
};

#define SIM_BY_USER 0
#define SIM_ALLOW 1
#define SIM_DENY 2

/* In clients[]: it has called nvmlShutdown. A process that died is found out by its id. */
#define SIM_CLIENT_LEFT 0xffffffffu

/* A mapped state. Every reader and writer, in any process, holds its lock. */
struct sim_node;

#pragma GCC visibility push(default)   /* the driver calls these; the rest of the library is its own business */

struct sim_node *sim_open(const char *path);
void sim_close(struct sim_node *node);
struct sim_state *sim_lock(struct sim_node *node);   /* brings the physics up to now */
void sim_unlock(struct sim_node *node);
void sim_commit(struct sim_node *node);              /* draws the consequences of what was changed */
int64_t sim_now(const struct sim_state *state);
void sim_wait(struct sim_node *node, uint32_t seen, int64_t timeout_ns);
uint64_t sim_state_size(void);
const char *sim_function_name(uint32_t function);

uint32_t sim_enforced_mw(const struct sim_gpu *gpu);
double sim_power_watts(const struct sim_gpu *gpu, int64_t now);
double sim_energy_joules(const struct sim_gpu *gpu, int64_t now);
double sim_average_watts(const struct sim_gpu *gpu, int64_t now);
double sim_celsius(const struct sim_gpu *gpu, int64_t now);
double sim_clock_share(const struct sim_gpu *gpu);
void sim_reset_gpu(struct sim_state *state, struct sim_gpu *gpu);

#pragma GCC visibility pop

/* Whether this node is (still) what the path names. */
int sim_is(const struct sim_node *node, const char *path);

#endif
