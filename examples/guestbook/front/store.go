package main

import (
	"context"
	"encoding/json"
	"time"

	"github.com/redis/go-redis/v9"
)

// Keys and bounds of what is kept.
const (
	visitsKey  = "visits"
	entriesKey = "entries"
	maxEntries = 100
	shown      = 20
)

// entry is one line of the book.
type entry struct {
	Name string
	Text string
	At   time.Time
}

// store keeps visits and entries in Redis.
type store struct{ client *redis.Client }

// visit counts one visit and returns how many there were.
func (s store) visit(ctx context.Context) (int64, error) {
	return s.client.Incr(ctx, visitsKey).Result()
}

// add writes an entry; only the newest maxEntries are kept.
func (s store) add(ctx context.Context, e entry) error {
	text, err := json.Marshal(e)
	if err != nil {
		return err
	}
	_, err = s.client.TxPipelined(ctx, func(p redis.Pipeliner) error {
		p.LPush(ctx, entriesKey, text)
		p.LTrim(ctx, entriesKey, 0, maxEntries-1)
		return nil
	})
	return err
}

// entries returns the newest ones, newest first. What cannot be read is left out.
func (s store) entries(ctx context.Context) ([]entry, error) {
	texts, err := s.client.LRange(ctx, entriesKey, 0, shown-1).Result()
	if err != nil {
		return nil, err
	}
	var list []entry
	for _, text := range texts {
		var e entry
		if json.Unmarshal([]byte(text), &e) == nil {
			list = append(list, e)
		}
	}
	return list, nil
}

// ready tells whether the store answers.
func (s store) ready(ctx context.Context) error { return s.client.Ping(ctx).Err() }
