"""Buckets in Redis or Valkey: on one server, behind Sentinel, or in a cluster."""

from ratelimit.stores.redis.store import AsyncRedisStore, RedisStore

__all__ = ["AsyncRedisStore", "RedisStore"]
