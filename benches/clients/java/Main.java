// The jobs of ../README.md through lettuce or jedis.

import io.lettuce.core.RedisCommandTimeoutException;
import io.netty.channel.ConnectTimeoutException;
import java.io.IOException;
import java.io.PrintStream;
import java.net.ConnectException;
import java.net.SocketTimeoutException;
import java.util.ArrayList;
import java.util.List;
import java.util.StringJoiner;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;

/** What one task saw. */
final class Log {
    // Errors that are looked at for one: they may go round in a circle.
    private static final int WRAPPINGS = 20;

    final String job;
    final int task;
    final String key;
    final long periodMs;
    private final StringJoiner acks = new StringJoiner(",", "[", "]");
    private final StringJoiner errors = new StringJoiner(",", "[", "]");
    private boolean begun;

    Log(String job, int task, String key, long periodMs) {
        this.job = job;
        this.task = task;
        this.key = key;
        this.periodMs = periodMs;
    }

    synchronized void ack(String number) {
        acks.add("[" + number + "," + System.currentTimeMillis() + "]");
        begun = true;
    }

    synchronized void error(Throwable error) {
        errors.add("[" + System.currentTimeMillis() + "," + quoted(kind(error)) + "]");
    }

    synchronized boolean begun() {
        return begun;
    }

    synchronized String line(String library, long at) {
        return String.format(
                "{\"library\":%s,\"job\":%s,\"task\":%d,\"key\":%s,"
                        + "\"period_ms\":%d,\"ended_ms\":%d,\"acks\":%s,\"errors\":%s}",
                quoted(library),
                quoted(job),
                task,
                key == null ? "null" : quoted(key),
                periodMs,
                at,
                acks,
                errors);
    }

    private static String quoted(String text) {
        return '"' + text.replace("\\", "\\\\").replace("\"", "\\\"") + '"';
    }

    /** A word for what happened. Both libraries wrap it in errors of their own. */
    private static String kind(Throwable error) {
        List<Throwable> all = new ArrayList<>(List.of(error));
        for (int at = 0; at < all.size() && at < WRAPPINGS; at++) {
            Throwable one = all.get(at);
            String word = word(one, one.getMessage() == null ? "" : one.getMessage());
            if (word != null) {
                return word;
            }
            if (one.getCause() != null) {
                all.add(one.getCause());
            }
            all.addAll(List.of(one.getSuppressed()));
        }
        return error.getClass().getSimpleName();
    }

    private static String word(Throwable error, String text) {
        String first = text.split(" ")[0];
        if (first.matches("[A-Z]{3,}")) {
            return first;
        } else if (error instanceof RedisCommandTimeoutException
                || error instanceof SocketTimeoutException
                || error instanceof ConnectTimeoutException) {
            return "timeout";
        } else if (error instanceof ConnectException) {
            return "refused";
        } else if (text.startsWith("Connection reset")) {
            return "reset";
        } else if (text.startsWith("Unexpected end of stream")) {
            return "EOF";
        }
        return null;
    }
}

/** The jobs of one library at one address. */
final class Main {
    private static final int POOL_CLIENTS = 1_000;
    private static final long POOL_PERIOD_MS = 5_000;
    // Longest wait for the first acknowledgements.
    private static final long READY_MS = 60_000;

    private final CountDownLatch end = new CountDownLatch(1);
    private final List<Log> logs = new ArrayList<>();
    private final String library;
    private final boolean cluster;
    private final String prefix;
    private final Supplier<Client> opener;

    private interface Operation {
        void with(String number) throws InterruptedException;
    }

    private Main(String library, boolean cluster, String prefix, Supplier<Client> opener) {
        this.library = library;
        this.cluster = cluster;
        this.prefix = prefix;
        this.opener = opener;
    }

    private boolean ended() {
        return end.getCount() == 0;
    }

    private Log log(String job, int task, String key, long periodMs) {
        Log log = new Log(job, task, key, periodMs);
        logs.add(log);
        return log;
    }

    private static void begin(Runnable work) {
        Thread thread = new Thread(work);
        thread.setDaemon(true);
        thread.start();
    }

    private static void pause(long ms) {
        try {
            Thread.sleep(ms);
        } catch (InterruptedException nobody) {
            throw new AssertionError(nobody);
        }
    }

    private void once(Log log, long number, Operation operation) {
        try {
            operation.with(Long.toString(number));
            log.ack(Long.toString(number));
        } catch (Exception error) {
            log.error(error);
        }
    }

    /** Calls it with a new number for each try, until the end. */
    private void repeat(Log log, Operation operation) {
        begin(() -> {
            for (long number = 1; !ended(); number++) {
                once(log, number, operation);
                pause(log.periodMs);
            }
        });
    }

    /** Calls it until the end; it notes itself what it received. */
    private void receive(Log log, Operation operation) {
        begin(() -> {
            while (!ended()) {
                try {
                    operation.with(null);
                } catch (Exception error) {
                    log.error(error);
                    pause(10);
                }
            }
        });
    }

    private void begin(String job) {
        switch (job) {
            case "write" -> {
                Client client = opener.get();
                for (int task = 0; task < 6; task++) {
                    String key = prefix + ":write:{" + task + "}";
                    repeat(log("write", task, key, 10), number -> client.add(key, number));
                }
            }
            case "multi" -> multi();
            case "subscriber" -> subscriber();
            case "blpop" -> blpop();
            case "pool" -> pool();
            default -> throw new IllegalArgumentException(job + ": no such job");
        }
    }

    private void multi() {
        if (cluster) {
            // Neither library has transactions there.
            return;
        }
        Client client = opener.get();
        for (int task = 0; task < 2; task++) {
            String key = prefix + ":multi:{" + task + "}";
            repeat(log("multi", task, key, 10), number -> client.addInTransaction(key, number));
        }
    }

    private void subscriber() {
        Client publisher = opener.get();
        Client client = opener.get();
        String channel = prefix + ":channel";
        Log received = log("subscriber", 0, null, 20);
        receive(received, none -> client.subscribe(channel, received::ack));
        repeat(log("publish", 0, null, 20), number -> publisher.publish(channel, number));
    }

    private void blpop() {
        // A connection that waits can do nothing else.
        Client waiting = opener.get();
        Client pushing = opener.get();
        String key = prefix + ":list";
        Log popped = log("blpop", 0, null, 20);
        receive(popped, none -> {
            String number = waiting.pop(key);
            if (number != null) {
                popped.ack(number);
            }
        });
        repeat(log("push", 0, null, 20), number -> pushing.push(key, number));
    }

    private void pool() {
        List<Client> clients = new ArrayList<>();
        List<Log> seen = new ArrayList<>();
        for (int task = 0; task < POOL_CLIENTS; task++) {
            clients.add(opener.get());
            seen.add(log("pool", task, prefix + ":pool:" + task, POOL_PERIOD_MS));
        }
        // Each client of jedis is a pool: a few threads take turns with them.
        int threads = library.equals("jedis") ? 20 : POOL_CLIENTS;
        int share = POOL_CLIENTS / threads;
        for (int thread = 0; thread < threads; thread++) {
            int first = thread;
            begin(() -> {
                // Not all at once.
                pause(first * POOL_PERIOD_MS / POOL_CLIENTS);
                for (long number = 1; !ended(); number++) {
                    for (int task = first; task < POOL_CLIENTS && !ended(); task += threads) {
                        int at = task;
                        once(seen.get(at), number, text -> clients.get(at).add(seen.get(at).key, text));
                        pause(POOL_PERIOD_MS / share);
                    }
                }
            });
        }
    }

    private boolean ready() {
        return logs.stream().allMatch(Log::begun);
    }

    private void readToEnd() {
        try {
            while (System.in.read() >= 0) {}
        } catch (IOException closed) {
            // That is an end, too.
        }
        end.countDown();
    }

    private void run(long seconds, String[] jobs) throws InterruptedException {
        long begun = System.nanoTime();
        begin(this::readToEnd);
        for (String job : jobs) {
            begin(job);
        }
        while (!ready() && passedMs(begun) < READY_MS && !ended()) {
            pause(50);
        }
        System.out.println("{\"ready\":" + ready() + "}");
        end.await(seconds * 1_000 - passedMs(begun), TimeUnit.MILLISECONDS);
        long at = System.currentTimeMillis();
        end.countDown();
        PrintStream out = new PrintStream(System.out, false);
        for (Log log : logs) {
            out.println(log.line(library, at));
        }
        out.flush();
    }

    private static long passedMs(long since) {
        return TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - since);
    }

    public static void main(String[] arguments) {
        try {
            if (arguments.length != 6) {
                throw new IllegalArgumentException("expected LIBRARY TOPOLOGY HOST:PORT SECONDS RUN JOBS");
            }
            String library = arguments[0];
            boolean cluster = arguments[1].equals("Cluster");
            int colon = arguments[2].lastIndexOf(':');
            String host = arguments[2].substring(0, colon);
            int port = Integer.parseInt(arguments[2].substring(colon + 1));
            String password = System.getenv("VALKEY_PASSWORD");
            Supplier<Client> opener = Client.opener(library, cluster, host, port, password);
            Main main = new Main(library, cluster, arguments[4] + ":" + library, opener);
            main.run(Long.parseLong(arguments[3]), arguments[5].split(","));
        } catch (Exception error) {
            System.err.println(error);
            Runtime.getRuntime().halt(1);
        }
        // Threads that hang in the library would keep the process.
        Runtime.getRuntime().halt(0);
    }
}
