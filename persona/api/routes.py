"""Every route of the service, and the two applications that carry them.

The TCP application and the admin socket share the users' own routes; only the way in which a caller is known differs.
"""

from aiohttp import web
from aiohttp.typedefs import Middleware

from persona.api import (
    admin,
    archive,
    auth,
    completions,
    errors,
    events,
    forget,
    history,
    live,
    me,
    models,
    ollama,
    ollama_models,
    ops,
    text_completions,
    versions,
)
from persona.api.services import SERVICES, Services

OPS = (
    web.get("/health", ops.health),
    web.get("/ready", ops.ready),
    web.get("/metrics", ops.metrics),
)
USERS = (
    web.post("/v1/chat/completions", completions.complete),
    web.post("/v1/completions", text_completions.complete),
    web.get("/v1/models", models.models),
    web.get("/v1/models/{model:.+}", models.model),
    web.post("/v1/feedback", me.feedback),
    web.get("/v1/me", me.show),
    web.get("/v1/me/history", history.page),
    web.post("/v1/me/history", history.add),
    web.delete("/v1/me/history/{id}", history.delete),
    web.get("/v1/me/events", events.page),
    web.post("/v1/me/events/{kind}", events.send),
    web.get("/v1/me/events/dead", events.dead),
    web.post("/v1/me/events/dead/replay", events.replay),
    web.delete("/v1/me/events/dead/{id}", events.drop),
    web.get("/v1/me/facts", events.facts),
    web.delete("/v1/me/facts/{kind}/{key:.+}", events.drop_fact),
    web.get("/v1/me/versions", versions.versions),
    web.get("/v1/me/runs", me.runs),
    web.get("/v1/me/runs/{id}", me.run),
    web.post("/v1/me/train", me.train),
    web.post("/v1/me/pause", me.pause),
    web.post("/v1/me/resume", me.resume),
    web.post("/v1/me/rollback", versions.roll_back),
    web.post("/v1/me/why", me.why),
    web.get("/v1/me/export", archive.export),
    web.post("/v1/me/forget", forget.forget),
)
OLLAMA = (
    web.get("/", ollama_models.greet),
    web.post("/api/chat", ollama.chat),
    web.post("/api/generate", ollama.generate),
    web.get("/api/tags", ollama_models.tags),
    web.get("/api/ps", ollama_models.running),
    web.get("/api/version", ollama_models.version),
    web.post("/api/show", ollama_models.show),
    web.post("/api/pull", ollama_models.pull),
)
# For clients that can be told nothing but an address.
KEYED = tuple(web.route(route.method, f"{auth.KEYED}/{{key}}{route.path}", route.handler) for route in OLLAMA)
ADMIN = (
    web.post("/admin/users", admin.add_user),
    web.get("/admin/users", admin.list_users),
    web.post("/admin/users/{name}/keys", admin.add_key),
    web.get("/admin/users/{name}/keys", admin.list_keys),
    web.delete("/admin/users/{name}/keys/{id}", admin.revoke_key),
    web.post("/admin/users/{name}/adapters/export", admin.export_adapter),
    web.post("/admin/users/{name}/adapters/import", admin.import_adapter),
    web.get("/admin/events/dead", events.all_dead),
    web.post("/admin/events/dead/replay", events.replay_any),
    web.delete("/admin/events/dead/{id}", events.drop_any),
    web.get("/admin/live", live.report),
    web.get("/admin/status", admin.status),
    web.post("/admin/backup", admin.backup),
)


def public_application(services: Services) -> web.Application:
    """What listens on TCP: a key for everything but the explicit public list."""
    failures = auth.Failures(services.settings.http.failures_per_minute)
    return _application(services, [errors.answer, auth.by_key(failures)], (*OPS, *USERS, *OLLAMA, *KEYED))


def admin_application(services: Services) -> web.Application:
    """What listens on the admin socket: whoever can open it may do everything."""
    return _application(services, [errors.answer, auth.by_header], (*OPS, *USERS, *OLLAMA, *ADMIN))


def _application(
    services: Services, middlewares: list[Middleware], routes: tuple[web.RouteDef, ...]
) -> web.Application:
    application = web.Application(middlewares=middlewares)
    application[SERVICES] = services
    application.add_routes(routes)
    application.on_response_prepare.append(errors.harden)
    return application
