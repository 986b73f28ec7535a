package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/valkey-io/valkey-go"
)

// opener gives what makes a client of a library, with what the library does if nobody says anything.
func opener(library string, cluster bool, address, password string) (func() client, error) {
	switch library {
	case "go-redis":
		return func() client {
			if cluster {
				options := &redis.ClusterOptions{Addrs: []string{address}, Password: password}
				return goRedis{redis.NewClusterClient(options)}
			}
			return goRedis{redis.NewClient(&redis.Options{Addr: address, Password: password})}
		}, nil
	case "valkey-go":
		options := valkey.ClientOption{InitAddress: []string{address}, Password: password}
		return func() client {
			c, err := valkey.NewClient(options)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return valkeyGo{c}
		}, nil
	}
	return nil, fmt.Errorf("%s: no such library", library)
}

type goRedis struct{ redis.UniversalClient }

func (c goRedis) add(ctx context.Context, key string, number int) error {
	return c.SAdd(ctx, key, number).Err()
}

func (c goRedis) addInTransaction(ctx context.Context, key string, number int) error {
	_, err := c.TxPipelined(ctx, func(p redis.Pipeliner) error {
		p.SAdd(ctx, key, number)
		p.Incr(ctx, key+":count")
		return nil
	})
	return err
}

func (c goRedis) publish(ctx context.Context, channel string, number int) error {
	return c.Publish(ctx, channel, number).Err()
}

func (c goRedis) push(ctx context.Context, key string, number int) error {
	return c.RPush(ctx, key, number).Err()
}

func (c goRedis) pop(ctx context.Context, key string) (string, bool, error) {
	found, err := c.BLPop(ctx, time.Second, key).Result()
	if errors.Is(err, redis.Nil) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	return found[1], true, nil
}

func (c goRedis) subscribe(ctx context.Context, channel string, received func(string)) error {
	subscription := c.Subscribe(ctx, channel)
	messages := subscription.Channel()
	for {
		select {
		case <-ctx.Done():
			return nil
		case message, open := <-messages:
			if !open {
				return errors.New("closed")
			}
			received(message.Payload)
		}
	}
}

type valkeyGo struct{ valkey.Client }

func (c valkeyGo) add(ctx context.Context, key string, number int) error {
	return c.Do(ctx, c.B().Sadd().Key(key).Member(strconv.Itoa(number)).Build()).Error()
}

func (c valkeyGo) addInTransaction(ctx context.Context, key string, number int) error {
	return c.Dedicated(func(d valkey.DedicatedClient) error {
		answers := d.DoMulti(ctx,
			d.B().Multi().Build(),
			d.B().Sadd().Key(key).Member(strconv.Itoa(number)).Build(),
			d.B().Incr().Key(key+":count").Build(),
			d.B().Exec().Build(),
		)
		for _, answer := range answers {
			if err := answer.Error(); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c valkeyGo) publish(ctx context.Context, channel string, number int) error {
	return c.Do(ctx, c.B().Publish().Channel(channel).Message(strconv.Itoa(number)).Build()).Error()
}

func (c valkeyGo) push(ctx context.Context, key string, number int) error {
	return c.Do(ctx, c.B().Rpush().Key(key).Element(strconv.Itoa(number)).Build()).Error()
}

func (c valkeyGo) pop(ctx context.Context, key string) (string, bool, error) {
	found, err := c.Do(ctx, c.B().Blpop().Key(key).Timeout(1).Build()).AsStrSlice()
	if valkey.IsValkeyNil(err) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	return found[1], true, nil
}

func (c valkeyGo) subscribe(ctx context.Context, channel string, received func(string)) error {
	return c.Receive(ctx, c.B().Subscribe().Channel(channel).Build(), func(message valkey.PubSubMessage) {
		received(message.Message)
	})
}
