// What the jobs need of a library, and the two libraries.

import io.lettuce.core.RedisURI;
import io.lettuce.core.TransactionResult;
import io.lettuce.core.api.sync.RedisCommands;
import io.lettuce.core.cluster.RedisClusterClient;
import io.lettuce.core.cluster.api.sync.RedisClusterCommands;
import io.lettuce.core.pubsub.RedisPubSubAdapter;
import io.lettuce.core.pubsub.StatefulRedisPubSubConnection;
import io.lettuce.core.resource.ClientResources;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import java.util.function.Consumer;
import java.util.function.Supplier;
import redis.clients.jedis.AbstractTransaction;
import redis.clients.jedis.HostAndPort;
import redis.clients.jedis.JedisPubSub;
import redis.clients.jedis.UnifiedJedis;

/** What the jobs need of a library. */
interface Client {
    void add(String key, String number);

    void addInTransaction(String key, String number);

    void publish(String channel, String number);

    void push(String key, String number);

    /** Waits up to a second; null if nothing came. */
    String pop(String key);

    /** Calls back for each message, until an error. */
    void subscribe(String channel, Consumer<String> received) throws InterruptedException;

    /** What makes a client of a library, which does what it does if nobody says anything. */
    static Supplier<Client> opener(String library, boolean cluster, String host, int port, String password) {
        switch (library) {
            case "lettuce":
                // One for all clients, as its documentation advises: each would have threads of its own.
                ClientResources resources = ClientResources.create();
                RedisURI.Builder at = RedisURI.Builder.redis(host, port);
                RedisURI uri = at.withPassword(password.toCharArray()).build();
                if (cluster) {
                    return () -> Lettuce.of(RedisClusterClient.create(resources, uri));
                }
                return () -> Lettuce.of(io.lettuce.core.RedisClient.create(resources, uri));
            case "jedis":
                Set<HostAndPort> first = Set.of(new HostAndPort(host, port));
                if (cluster) {
                    return () ->
                            new Jedis(redis.clients.jedis.RedisClusterClient.create(first, null, password));
                }
                return () -> new Jedis(redis.clients.jedis.RedisClient.create(host, port, null, password));
            default:
                throw new IllegalArgumentException(library + ": no such library");
        }
    }

    /** Threads share its connection. Transactions cannot, so each thread has another for them. */
    record Lettuce(
            RedisClusterCommands<String, String> commands,
            ThreadLocal<RedisCommands<String, String>> own,
            Supplier<StatefulRedisPubSubConnection<String, String>> subscription)
            implements Client {

        static Lettuce of(io.lettuce.core.RedisClient client) {
            var own = ThreadLocal.withInitial(() -> client.connect().sync());
            return new Lettuce(client.connect().sync(), own, client::connectPubSub);
        }

        static Lettuce of(RedisClusterClient client) {
            return new Lettuce(client.connect().sync(), null, client::connectPubSub);
        }

        @Override
        public void add(String key, String number) {
            commands.sadd(key, number);
        }

        @Override
        public void addInTransaction(String key, String number) {
            RedisCommands<String, String> mine = own.get();
            try {
                mine.multi();
                mine.sadd(key, number);
                mine.incr(key + ":count");
                TransactionResult answers = mine.exec();
                for (Object answer : answers) {
                    if (answer instanceof RuntimeException error) {
                        throw error;
                    }
                }
            } catch (RuntimeException error) {
                discard(mine);
                throw error;
            }
        }

        /** Ends what a failed transaction may have left begun: the next MULTI would be refused. */
        private static void discard(RedisCommands<String, String> mine) {
            try {
                mine.discard();
            } catch (RuntimeException none) {
                // Nothing was begun.
            }
        }

        @Override
        public void publish(String channel, String number) {
            commands.publish(channel, number);
        }

        @Override
        public void push(String key, String number) {
            commands.rpush(key, number);
        }

        @Override
        public String pop(String key) {
            var found = commands.blpop(1, key);
            return found == null ? null : found.getValue();
        }

        @Override
        public void subscribe(String channel, Consumer<String> received) throws InterruptedException {
            var connection = subscription.get();
            connection.addListener(new RedisPubSubAdapter<>() {
                @Override
                public void message(String from, String text) {
                    received.accept(text);
                }
            });
            connection.sync().subscribe(channel);
            // From here on it subscribes again by itself.
            new CountDownLatch(1).await();
        }
    }

    /** A pool of connections. */
    record Jedis(UnifiedJedis client) implements Client {
        @Override
        public void add(String key, String number) {
            client.sadd(key, number);
        }

        @Override
        public void addInTransaction(String key, String number) {
            try (AbstractTransaction transaction = client.multi()) {
                transaction.sadd(key, number);
                transaction.incr(key + ":count");
                for (Object answer : transaction.exec()) {
                    if (answer instanceof RuntimeException error) {
                        throw error;
                    }
                }
            }
        }

        @Override
        public void publish(String channel, String number) {
            client.publish(channel, number);
        }

        @Override
        public void push(String key, String number) {
            client.rpush(key, number);
        }

        @Override
        public String pop(String key) {
            List<String> found = client.blpop(1, key);
            return found == null ? null : found.get(1);
        }

        @Override
        public void subscribe(String channel, Consumer<String> received) {
            JedisPubSub listener = new JedisPubSub() {
                @Override
                public void onMessage(String from, String text) {
                    received.accept(text);
                }
            };
            client.subscribe(listener, channel);
        }
    }
}
