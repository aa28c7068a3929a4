import com.fasterxml.jackson.core.json.JsonWriteFeature;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.PropertyNamingStrategies;
import com.fasterxml.jackson.databind.json.JsonMapper;
import io.github.bucket4j.Bandwidth;
import io.github.bucket4j.BandwidthBuilder.BandwidthBuilderBuildStage;
import io.github.bucket4j.BandwidthBuilder.BandwidthBuilderRefillStage;
import io.github.bucket4j.BucketConfiguration;
import io.github.bucket4j.BucketState;
import io.github.bucket4j.BucketState64BitsInteger;
import io.github.bucket4j.EstimationProbe;
import io.github.bucket4j.Nothing;
import io.github.bucket4j.TimeMeter;
import io.github.bucket4j.TokensInheritanceStrategy;
import io.github.bucket4j.VerboseBucket;
import io.github.bucket4j.VerboseResult;
import io.github.bucket4j.distributed.BucketProxy;
import io.github.bucket4j.distributed.ExpirationAfterWriteStrategy;
import io.github.bucket4j.distributed.proxy.ProxyManager;
import io.github.bucket4j.distributed.remote.RemoteBucketState;
import io.github.bucket4j.distributed.serialization.InternalSerializationHelper;
import io.github.bucket4j.distributed.serialization.Scope;
import io.github.bucket4j.distributed.versioning.Versions;
import io.github.bucket4j.redis.lettuce.Bucket4jLettuce;
import io.lettuce.core.RedisClient;
import io.lettuce.core.api.StatefulRedisConnection;
import io.lettuce.core.codec.ByteArrayCodec;
import io.lettuce.core.codec.RedisCodec;
import io.lettuce.core.codec.StringCodec;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.time.DayOfWeek;
import java.time.Duration;
import java.time.Instant;
import java.time.LocalDate;
import java.time.YearMonth;
import java.time.ZoneId;
import java.time.temporal.IsoFields;
import java.time.temporal.TemporalAdjusters;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.stream.IntStream;
import java.util.stream.Stream;

/**
 * Bucket4j at the service of the tests: for each line of standard input, a request in JSON, it writes a line of JSON,
 * {@code {"result": ...}} or {@code {"error": ...}}. The words are those of tests/data/README.md.
 */
public final class Peer {
    /** @param now the time in nanoseconds; null: the wall clock */
    record Request(String op, String key, Long now, Limits configuration, Replacement implicitReplacement,
                   Expiration expiration, Arguments args, int threads) {}

    record Replacement(long version, TokensInheritanceStrategy strategy) {}

    record Arguments(long tokens, Long limit, long maxWaitNanos, Limits configuration,
                     TokensInheritanceStrategy strategy, List<Quota> quotas, long version) {}

    record Expiration(String kind, long durationMillis) {
        ExpirationAfterWriteStrategy build() {
            Duration duration = Duration.ofMillis(durationMillis);
            return switch (kind) {
                case "none" -> ExpirationAfterWriteStrategy.none();
                case "fixed" -> ExpirationAfterWriteStrategy.fixedTimeToLive(duration);
                case "after_refill" -> ExpirationAfterWriteStrategy.basedOnTimeForRefillingBucketUpToMax(duration);
                default -> throw new IllegalArgumentException(kind);
            };
        }
    }

    record Limit(long capacity, long initialTokens, long refillPeriodNanos, long refillTokens,
                 boolean refillIntervally, Long timeOfFirstRefillMillis, boolean adaptiveInitialTokens, String id) {
        static Limit of(Bandwidth one) {
            return new Limit(one.getCapacity(), one.getInitialTokens(), one.getRefillPeriodNanos(),
                one.getRefillTokens(), one.isRefillIntervally(),
                one.isIntervallyAligned() ? one.getTimeOfFirstRefillMillis() : null, one.isUseAdaptiveInitialTokens(),
                one.getId());
        }

        Bandwidth build() {
            BandwidthBuilderRefillStage stage = Bandwidth.builder().capacity(capacity);
            Duration period = Duration.ofNanos(refillPeriodNanos);
            BandwidthBuilderBuildStage limit;
            if (timeOfFirstRefillMillis == null) {
                limit = refillIntervally
                    ? stage.refillIntervally(refillTokens, period) : stage.refillGreedy(refillTokens, period);
            } else {
                Instant first = Instant.ofEpochMilli(timeOfFirstRefillMillis);
                limit = adaptiveInitialTokens
                    ? stage.refillIntervallyAlignedWithAdaptiveInitialTokens(refillTokens, period, first)
                    : stage.refillIntervallyAligned(refillTokens, period, first);
            }
            if (!adaptiveInitialTokens) {
                limit = limit.initialTokens(initialTokens);
            }
            return (id == null ? limit : limit.id(id)).build();
        }
    }

    record Limits(List<Limit> bandwidths) {
        static Limits of(BucketConfiguration configuration) {
            return new Limits(Stream.of(configuration.getBandwidths()).map(Limit::of).toList());
        }

        BucketConfiguration build() {
            return new BucketConfiguration(bandwidths.stream().map(Limit::build).toList());
        }
    }

    /** A quota of the calendar, as docs/calendar-quotas.md has it. */
    record Quota(long capacity, String unit, String tz) {
        private LocalDate first(Instant now) {
            LocalDate day = now.atZone(ZoneId.of(tz)).toLocalDate();
            return switch (unit) {
                case "day" -> day;
                case "week" -> day.with(TemporalAdjusters.previousOrSame(DayOfWeek.MONDAY));
                case "month" -> day.withDayOfMonth(1);
                case "year" -> day.withDayOfYear(1);
                default -> throw new IllegalArgumentException(unit);
            };
        }

        Instant begin(Instant now) {
            return first(now).atStartOfDay(ZoneId.of(tz)).toInstant();
        }

        Bandwidth at(Instant now) {
            LocalDate first = first(now);
            LocalDate next = unit.equals("day") ? first.plusDays(1) : unit.equals("week") ? first.plusWeeks(1)
                : unit.equals("month") ? first.plusMonths(1) : first.plusYears(1);
            Instant end = next.atStartOfDay(ZoneId.of(tz)).toInstant();
            String name = switch (unit) {
                case "day" -> first.toString();
                case "week" -> "%04d-W%02d".formatted(
                    first.get(IsoFields.WEEK_BASED_YEAR), first.get(IsoFields.WEEK_OF_WEEK_BASED_YEAR));
                case "month" -> YearMonth.from(first).toString();
                default -> "%04d".formatted(first.getYear());
            };
            return Bandwidth.builder().capacity(capacity)
                .refillIntervallyAligned(capacity, Duration.between(begin(now), end), end)
                .id(unit + " " + name + (tz.equals("UTC") ? "" : " " + tz))
                .build();
        }
    }

    record Numbers(long lastRefillTimeNanos, long currentSize, long roundingError) {
        static List<Numbers> of(BucketState state) throws IOException {
            long[] data = (long[]) BucketState64BitsInteger.SERIALIZATION_HANDLE
                .toJsonCompatibleSnapshot((BucketState64BitsInteger) state, Versions.getLatest(), Scope.PERSISTED_STATE)
                .get("stateData");
            return IntStream.range(0, data.length / 3)
                .mapToObj(i -> new Numbers(data[3 * i], data[3 * i + 1], data[3 * i + 2]))
                .toList();
        }
    }

    record FixedClock(long currentTimeNanos) implements TimeMeter {
        @Override
        public boolean isWallClockBased() {
            return true;
        }
    }

    private static final ObjectMapper JSON = JsonMapper.builder()
        .propertyNamingStrategy(PropertyNamingStrategies.SNAKE_CASE)
        .enable(JsonWriteFeature.ESCAPE_NON_ASCII)
        .build();

    private final StatefulRedisConnection<String, byte[]> connection;
    private final ExecutorService threads = Executors.newCachedThreadPool();
    private volatile boolean hammering;
    private List<CompletableFuture<Long>> hammers = List.of();

    private Peer(RedisClient client) {
        connection = client.connect(RedisCodec.of(StringCodec.UTF8, ByteArrayCodec.INSTANCE));
    }

    /** @param args the URL of the Redis server */
    public static void main(String[] args) throws IOException {
        Peer peer = new Peer(RedisClient.create(args[0]));
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        for (String line = in.readLine(); line != null; line = in.readLine()) {
            Map<String, Object> reply = new LinkedHashMap<>();
            try {
                reply.put("result", peer.answer(JSON.readValue(line, Request.class)));
            } catch (Exception error) {
                reply.put("error", error.toString());
            }
            System.out.println(JSON.writeValueAsString(reply));
        }
        System.exit(0);
    }

    private Object answer(Request request) throws Exception {
        return switch (request.op) {
            case "read" -> read(request.key);
            case "calendar" -> calendar(request);
            case "hammer" -> hammer(request);
            case "stop" -> stop();
            case "get_configuration" -> manager(request).getProxyConfiguration(request.key).map(Limits::of).orElse(null);
            case "remove" -> {
                manager(request).removeProxy(request.key);
                yield null;
            }
            case "blocking_try_consume", "blocking_consume" -> block(request);
            default -> request.op.startsWith("verbose_") ? verbose(request) : plain(request);
        };
    }

    /** The limits that a Java service has at this time, and their version, from quotas of the calendar. */
    private Object calendar(Request request) {
        Instant now = Instant.EPOCH.plusNanos(request.now);
        List<Quota> quotas = request.args.quotas;
        long quarter = quotas.stream().mapToLong(one -> one.begin(now).getEpochSecond() / 900).max().getAsLong();
        Map<String, Object> answer = new LinkedHashMap<>();
        answer.put("configuration", new Limits(quotas.stream().map(one -> Limit.of(one.at(now))).toList()));
        answer.put("version", request.args.version * (1L << 24) + quarter);
        return answer;
    }

    private ProxyManager<String> manager(Request request) {
        var builder = Bucket4jLettuce.casBasedBuilder(connection);
        if (request.now != null) {
            builder.clientClock(new FixedClock(request.now));
        }
        if (request.expiration != null) {
            builder.expirationAfterWrite(request.expiration.build());
        }
        return builder.build();
    }

    private BucketProxy bucket(Request request) {
        var builder = manager(request).builder();
        Replacement implicit = request.implicitReplacement;
        if (implicit != null) {
            builder = builder.withImplicitConfigurationReplacement(implicit.version, implicit.strategy);
        }
        BucketConfiguration limits = request.configuration.build();
        return builder.build(request.key, () -> limits);
    }

    private Object plain(Request request) {
        BucketProxy bucket = bucket(request);
        Arguments args = request.args;
        return switch (request.op) {
            case "try_consume" -> bucket.tryConsume(args.tokens);
            case "try_consume_and_return_remaining" -> bucket.tryConsumeAndReturnRemaining(args.tokens);
            case "try_consume_as_much_as_possible" -> args.limit == null
                ? bucket.tryConsumeAsMuchAsPossible() : bucket.tryConsumeAsMuchAsPossible(args.limit);
            case "consume_ignoring_rate_limits" -> bucket.consumeIgnoringRateLimits(args.tokens);
            case "estimate_ability_to_consume" -> value(bucket.estimateAbilityToConsume(args.tokens));
            case "get_available_tokens" -> bucket.getAvailableTokens();
            default -> {
                switch (request.op) {
                    case "add_tokens" -> bucket.addTokens(args.tokens);
                    case "force_add_tokens" -> bucket.forceAddTokens(args.tokens);
                    case "reset" -> bucket.reset();
                    case "replace_configuration" ->
                        bucket.replaceConfiguration(args.configuration.build(), args.strategy);
                    default -> throw new UnsupportedOperationException(request.op);
                }
                yield null;
            }
        };
    }

    private Object verbose(Request request) throws IOException {
        VerboseBucket bucket = bucket(request).asVerbose();
        Arguments args = request.args;
        VerboseResult<?> result = switch (request.op.substring("verbose_".length())) {
            case "try_consume" -> bucket.tryConsume(args.tokens);
            case "try_consume_and_return_remaining" -> bucket.tryConsumeAndReturnRemaining(args.tokens);
            case "try_consume_as_much_as_possible" -> args.limit == null
                ? bucket.tryConsumeAsMuchAsPossible() : bucket.tryConsumeAsMuchAsPossible(args.limit);
            case "consume_ignoring_rate_limits" -> bucket.consumeIgnoringRateLimits(args.tokens);
            case "estimate_ability_to_consume" -> bucket.estimateAbilityToConsume(args.tokens);
            case "get_available_tokens" -> bucket.getAvailableTokens();
            case "add_tokens" -> bucket.addTokens(args.tokens);
            case "force_add_tokens" -> bucket.forceAddTokens(args.tokens);
            case "reset" -> bucket.reset();
            case "replace_configuration" -> bucket.replaceConfiguration(args.configuration.build(), args.strategy);
            default -> throw new UnsupportedOperationException(request.op);
        };
        Map<String, Object> answer = new LinkedHashMap<>();
        answer.put("value", value(result.getValue()));
        answer.put("operation_time_nanos", result.getOperationTimeNanos());
        answer.put("available_tokens", result.getDiagnostics().getAvailableTokens());
        answer.put("available_tokens_per_bandwidth", result.getDiagnostics().getAvailableTokensPerEachBandwidth());
        answer.put("full_refilling_time_nanos", result.getDiagnostics().calculateFullRefillingTime());
        answer.put("bandwidth_states", Numbers.of(result.getState()));
        answer.put("configuration", Limits.of(result.getConfiguration()));
        return answer;
    }

    /** What Jackson does not see by itself. */
    private static Object value(Object value) {
        if (value instanceof EstimationProbe probe) {
            return Map.of("can_be_consumed", probe.canBeConsumed(), "remaining_tokens", probe.getRemainingTokens(),
                "nanos_to_wait_for_refill", probe.getNanosToWaitForRefill());
        }
        return value instanceof Nothing ? null : value;
    }

    /** Wait for tokens without sleeping. */
    private Object block(Request request) {
        var bucket = bucket(request).asBlocking();
        List<Long> sleeps = new ArrayList<>(List.of(0L));
        Map<String, Object> answer = new LinkedHashMap<>();
        if (request.op.equals("blocking_consume")) {
            bucket.consumeUninterruptibly(request.args.tokens, sleeps::add);
            answer.put("sleep_nanos", sleeps.get(sleeps.size() - 1));
        } else {
            boolean consumed =
                bucket.tryConsumeUninterruptibly(request.args.tokens, request.args.maxWaitNanos, sleeps::add);
            answer.put("consumed", consumed);
            answer.put("sleep_nanos", consumed ? sleeps.get(sleeps.size() - 1) : null);
        }
        return answer;
    }

    /** The stored state as Bucket4j reads it, and what it would write in its place. */
    private Object read(String key) throws IOException {
        RemoteBucketState state = InternalSerializationHelper.deserializeState(connection.sync().get(key));
        Map<String, Object> answer = new LinkedHashMap<>();
        answer.put("configuration", Limits.of(state.getConfiguration()));
        answer.put("configuration_version", state.getConfigurationVersion());
        answer.put("consumed_tokens", state.getRemoteStat().getConsumedTokens());
        answer.put("bandwidth_states", Numbers.of(state.copyBucketState()));
        byte[] bytes = InternalSerializationHelper.serializeState(state, Versions.getLatest());
        answer.put("hex", HexFormat.of().formatHex(bytes));
        return answer;
    }

    /** Consume whatever comes, in several threads, until {@link #stop}. */
    private Object hammer(Request request) {
        hammering = true;
        BucketProxy bucket = bucket(request);
        hammers = Stream.generate(() -> CompletableFuture.supplyAsync(() -> consume(bucket), threads))
            .limit(request.threads)
            .toList();
        return null;
    }

    private long consume(BucketProxy bucket) {
        long taken = 0;
        while (hammering) {
            taken += bucket.tryConsume(1) ? 1 : 0;
        }
        return taken;
    }

    /** @return the tokens that each thread has taken */
    private Object stop() {
        hammering = false;
        return hammers.stream().map(CompletableFuture::join).toList();
    }
}
