-- A flowstead file of schema version 3: a waiting flow with four children, two of them waits, and an ended flow;
-- signals that are kept, taken and expired; updates that are delivered, superseded and pending.
-- Files like this one are out in the world: what is below is read as it is, and never brought up to date.
PRAGMA application_id = 1179407188;
PRAGMA user_version = 3;
BEGIN TRANSACTION;
CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    flow_key INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    doc TEXT NOT NULL
, crc INTEGER);
INSERT INTO "events" VALUES(1,1,1,'{"flowId":"triage-1","seq":1,"revision":0,"at":1800000000000,"type":"flow.created","actor":"agent:main:main","changed":{"status":"queued","controllerId":"my-plugin/inbox-triage","goal":"triage inbox","currentStep":"classify","stateJson":{"businessThreads":[1,2.5,null],"eodSummary":"it''s \"done\" 👩🏽‍🚀"}}}',994229902);
INSERT INTO "events" VALUES(2,1,2,'{"flowId":"triage-1","seq":2,"revision":0,"at":1800000000000,"type":"task.created","actor":"agent:main:main","taskId":"01a201e2-1c90-73dd-9ba3-b25283616110","changed":{"status":"running","runtime":"acp","task":"Classify inbox messages","runId":"inbox-classify-1"}}',464156043);
INSERT INTO "events" VALUES(3,1,3,'{"flowId":"triage-1","seq":3,"revision":0,"at":1800000001000,"type":"task.progressed","actor":"agent:main:main","taskId":"01a201e2-1c90-73dd-9ba3-b25283616110","changed":{"progressSummary":"half way"}}',3813954344);
INSERT INTO "events" VALUES(4,1,4,'{"flowId":"triage-1","seq":4,"revision":0,"at":1800000001000,"type":"task.created","actor":"agent:main:main","taskId":"01a201e2-1c91-7070-8092-9567e8a28a98","changed":{"status":"queued","runtime":"task","task":"classify","runId":"step-1"}}',3759859194);
INSERT INTO "events" VALUES(5,1,5,'{"flowId":"triage-1","seq":5,"revision":0,"at":1800000001000,"type":"task.started","actor":"agent:main:main","taskId":"01a201e2-1c91-7070-8092-9567e8a28a98","changed":{"status":"running","attempt":1,"startedAt":1800000001000}}',3603597650);
INSERT INTO "events" VALUES(6,1,6,'{"flowId":"triage-1","seq":6,"revision":0,"at":1800000001000,"type":"task.ended","actor":"runtime","taskId":"01a201e2-1c91-7070-8092-9567e8a28a98","changed":{"status":"succeeded","terminalOutcome":"succeeded","endedAt":1800000001000,"cleanupAfter":1800604801000}}',1469497146);
INSERT INTO "events" VALUES(7,1,7,'{"flowId":"triage-1","seq":7,"revision":1,"at":1800000002000,"type":"flow.waiting","actor":"agent:main:main","changed":{"status":"waiting","waitJson":{"kind":"reply","channel":"slack","threadKey":"slack:thread-1"},"currentStep":"await_business_reply"}}',1666556030);
INSERT INTO "events" VALUES(8,4,1,'{"flowId":"digest-1","seq":1,"revision":0,"at":1800000002000,"type":"flow.created","actor":"agent:main:main","changed":{"status":"running","controllerId":"my-plugin/digest","goal":"send the digest","stateJson":{"sent":0}}}',2720308450);
INSERT INTO "events" VALUES(9,4,2,'{"flowId":"digest-1","seq":2,"revision":1,"at":1800000002000,"type":"flow.updated","actor":"agent:main:main","changed":{"stateJson":{"sent":3}}}',3576155842);
INSERT INTO "events" VALUES(10,4,3,'{"flowId":"digest-1","seq":3,"revision":2,"at":1800000003000,"type":"flow.succeeded","actor":"agent:main:main","changed":{"status":"succeeded","endedAt":1800000003000,"stateJson":{"sent":4}}}',1784903611);
INSERT INTO "events" VALUES(11,1,8,'{"flowId":"triage-1","seq":8,"revision":1,"at":1800000010000,"type":"task.created","actor":"agent:main:main","taskId":"01a201e2-2a01-7aaa-8bbb-000000000001","changed":{"status":"queued","runtime":"signal","task":"ask","runId":"ask"}}',4145629003);
INSERT INTO "events" VALUES(12,1,9,'{"flowId":"triage-1","seq":9,"revision":1,"at":1800000010000,"type":"task.created","actor":"agent:main:main","taskId":"01a201e2-2a02-7aaa-8bbb-000000000002","changed":{"status":"queued","runtime":"timer","task":"nap","runId":"nap"}}',3713282115);
INSERT INTO "events" VALUES(13,1,10,'{"flowId":"triage-1","seq":10,"revision":1,"at":1800000010000,"type":"task.ended","actor":"agent:main:main","taskId":"01a201e2-2a02-7aaa-8bbb-000000000002","changed":{"status":"succeeded","terminalOutcome":"succeeded","endedAt":1800000010000,"cleanupAfter":1800604810000}}',492608440);
INSERT INTO "events" VALUES(14,1,11,'{"flowId":"triage-1","seq":11,"revision":2,"at":1800000010000,"type":"flow.waiting","actor":"agent:main:main"}',420061961);
CREATE TABLE flows (
    key INTEGER PRIMARY KEY,
    owner_key TEXT NOT NULL,
    flow_id TEXT NOT NULL,
    controller_id TEXT,
    correlation_id TEXT,
    idempotency_key TEXT,
    status TEXT NOT NULL,
    ended_at INTEGER,
    due_at INTEGER,
    revision INTEGER NOT NULL,
    doc TEXT NOT NULL
, crc INTEGER, wait_key TEXT, wait_token TEXT);
INSERT INTO "flows" VALUES(1,'agent:main:main','triage-1','my-plugin/inbox-triage','inbox','once','waiting',NULL,NULL,2,'{"flowId":"triage-1","syncMode":"managed","ownerKey":"agent:main:main","requesterOrigin":{"channel":"slack","to":"C1"},"controllerId":"my-plugin/inbox-triage","correlationId":"inbox","revision":2,"status":"waiting","notifyPolicy":"done_only","goal":"triage inbox","currentStep":"await_business_reply","stateJson":{"businessThreads":[1,2.5,null],"eodSummary":"it''s \"done\" 👩🏽‍🚀"},"stateVersion":1,"waitJson":{"kind":"reply","channel":"slack","threadKey":"slack:thread-1"},"createdAt":1800000000000,"updatedAt":1800000010000,"key":1,"idempotencyKey":"once","requestDigest":"fefaee3d5eeb4a2a556eb9c861afbe86aa50297a1e87c0064b96538195946679","wait":{"kind":"signal","waitKey":"5ed94ecbfb8218ca5325ca4fbd0ae295981730cd2c112c23e86ab45039666b4d","token":"tok_flow","prompt":"Which reply?"},"waitKey":"5ed94ecbfb8218ca5325ca4fbd0ae295981730cd2c112c23e86ab45039666b4d","waitToken":"df46db4addb4d59a45e54678796bf3b73811dac0ac3231b6e82c1c825c4bbd31"}',730616709,'5ed94ecbfb8218ca5325ca4fbd0ae295981730cd2c112c23e86ab45039666b4d','df46db4addb4d59a45e54678796bf3b73811dac0ac3231b6e82c1c825c4bbd31');
INSERT INTO "flows" VALUES(4,'agent:main:main','digest-1','my-plugin/digest',NULL,NULL,'succeeded',1800000003000,NULL,2,'{"flowId":"digest-1","syncMode":"managed","ownerKey":"agent:main:main","requesterOrigin":{"channel":"slack","to":"C1"},"controllerId":"my-plugin/digest","revision":2,"status":"succeeded","notifyPolicy":"done_only","goal":"send the digest","stateJson":{"sent":4},"stateVersion":1,"createdAt":1800000002000,"updatedAt":1800000003000,"endedAt":1800000003000,"key":4}',1678606645,NULL,NULL);
CREATE TABLE ownership (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    epoch INTEGER NOT NULL,
    commits INTEGER NOT NULL,
    last_position INTEGER NOT NULL,
    holder TEXT NOT NULL
, flows INTEGER NOT NULL DEFAULT 0, tasks INTEGER NOT NULL DEFAULT 0, events INTEGER NOT NULL DEFAULT 0, file TEXT NOT NULL DEFAULT '', signals INTEGER NOT NULL DEFAULT 0, updates INTEGER NOT NULL DEFAULT 0);
INSERT INTO "ownership" VALUES(1,1,13,14,'{"pid":1,"host":"localhost","since":"2027-01-15T08:00:00Z"}',2,4,14,'5d2f0c4b9a1e4f7088c3d6e5b4a39282',3,4);
CREATE TABLE signals (
    key INTEGER PRIMARY KEY,
    owner_key TEXT NOT NULL,
    wait_key TEXT NOT NULL,
    signal_id TEXT,
    kept INTEGER NOT NULL,
    expires_at INTEGER,
    doc TEXT NOT NULL,
    crc INTEGER
);
INSERT INTO "signals" VALUES(7,'agent:main:main','67eadcab57d0c5f858dca1e81c3b880146f152c3c66abc6dd118c757f900245f','evt-1',1,1800604810000,'{"key":7,"ownerKey":"agent:main:main","waitKey":"67eadcab57d0c5f858dca1e81c3b880146f152c3c66abc6dd118c757f900245f","signalId":"evt-1","payload":{"team":"billing"},"receivedAt":1800000010000,"expiresAt":1800604810000}',1235677283);
INSERT INTO "signals" VALUES(8,'agent:main:main','5ed94ecbfb8218ca5325ca4fbd0ae295981730cd2c112c23e86ab45039666b4d','evt-2',0,NULL,'{"key":8,"ownerKey":"agent:main:main","waitKey":"5ed94ecbfb8218ca5325ca4fbd0ae295981730cd2c112c23e86ab45039666b4d","signalId":"evt-2","receivedAt":1800000010000,"takenBy":"triage-1"}',3603176321);
INSERT INTO "signals" VALUES(9,'agent:main:main','67eadcab57d0c5f858dca1e81c3b880146f152c3c66abc6dd118c757f900245f',NULL,1,1800000010001,'{"key":9,"ownerKey":"agent:main:main","waitKey":"67eadcab57d0c5f858dca1e81c3b880146f152c3c66abc6dd118c757f900245f","receivedAt":1800000010000,"expiresAt":1800000010001}',3620900461);
CREATE TABLE tasks (
    key INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL UNIQUE,
    flow_key INTEGER NOT NULL,
    run_id TEXT,
    status TEXT NOT NULL,
    runtime TEXT NOT NULL,
    launched INTEGER NOT NULL,
    due_at INTEGER,
    doc TEXT NOT NULL
, crc INTEGER, wait_key TEXT, wait_token TEXT);
INSERT INTO "tasks" VALUES(2,'01a201e2-1c90-73dd-9ba3-b25283616110',1,'inbox-classify-1','running','acp',0,NULL,'{"taskId":"01a201e2-1c90-73dd-9ba3-b25283616110","flowId":"triage-1","runtime":"acp","runId":"inbox-classify-1","childSessionKey":"agent:main:subagent:classifier","task":"Classify inbox messages","status":"running","progressSummary":"half way","deliveryStatus":"pending","notifyPolicy":"done_only","createdAt":1800000000000,"startedAt":1800000000000,"lastEventAt":1800000001000,"key":2,"flowKey":1}',434512555,NULL,NULL);
INSERT INTO "tasks" VALUES(3,'01a201e2-1c91-7070-8092-9567e8a28a98',1,'step-1','succeeded','task',1,NULL,'{"taskId":"01a201e2-1c91-7070-8092-9567e8a28a98","flowId":"triage-1","runtime":"task","runId":"step-1","task":"classify","inputJson":{"subject":"Re: hello"},"status":"succeeded","attempt":1,"maxAttempts":3,"resultJson":{"label":"Re: hello","é":null},"terminalOutcome":"succeeded","deliveryStatus":"pending","notifyPolicy":"done_only","createdAt":1800000001000,"startedAt":1800000001000,"lastEventAt":1800000001000,"endedAt":1800000001000,"cleanupAfter":1800604801000,"key":3,"flowKey":1,"launch":{"function":"classify","retry":{"maxAttempts":3,"initial":1.0,"factor":2.0,"maxDelay":60.0,"jitter":0.1}}}',955873114,NULL,NULL);
INSERT INTO "tasks" VALUES(5,'01a201e2-2a01-7aaa-8bbb-000000000001',1,'ask','queued','signal',0,1800003610000,'{"taskId":"01a201e2-2a01-7aaa-8bbb-000000000001","flowId":"triage-1","runtime":"signal","runId":"ask","task":"ask","status":"queued","deliveryStatus":"not_applicable","notifyPolicy":"silent","createdAt":1800000010000,"key":5,"flowKey":1,"wait":{"kind":"signal","key":{"ticket":7},"waitKey":"f930b53f9f47d12115d046bd95b96276475435944a8f45bea1c076d97973c935","token":"tok_open","prompt":"Which team?","deadlineAt":1800003610000}}',2546795966,'f930b53f9f47d12115d046bd95b96276475435944a8f45bea1c076d97973c935','ff90c30a8cfa99c4be80b69b09e9eb7a04feb8a52b7346f65bea6f4842b4b6f1');
INSERT INTO "tasks" VALUES(6,'01a201e2-2a02-7aaa-8bbb-000000000002',1,'nap','succeeded','timer',0,NULL,'{"taskId":"01a201e2-2a02-7aaa-8bbb-000000000002","flowId":"triage-1","runtime":"timer","runId":"nap","task":"nap","status":"succeeded","terminalOutcome":"succeeded","deliveryStatus":"not_applicable","notifyPolicy":"silent","createdAt":1800000010000,"endedAt":1800000010000,"cleanupAfter":1800604810000,"key":6,"flowKey":1,"wait":{"kind":"timer","token":"tok_nap","deadlineAt":1800000010000,"onTimeout":"resume"}}',806087018,NULL,'3fe9921863e4044d71827fb8c6ad2e6c6061330761a3c05a70fe474e3e9e5385');
CREATE TABLE updates (
    key INTEGER PRIMARY KEY,
    owner_key TEXT NOT NULL,
    flow_key INTEGER NOT NULL,
    slot TEXT NOT NULL,
    status TEXT NOT NULL,
    due_at INTEGER,
    version INTEGER NOT NULL,
    bucket TEXT,
    doc TEXT NOT NULL,
    crc INTEGER
);
INSERT INTO "updates" VALUES(10,'agent:main:main',4,'progress','superseded',NULL,1,NULL,'{"idempotencyKey":"digest-1:progress","kind":"progress","ownerKey":"agent:main:main","flowId":"digest-1","revision":2,"flowStatus":"succeeded","goal":"send the digest","text":"sent 3 so far","requesterOrigin":{"channel":"slack","to":"C1"},"status":"superseded","createdAt":1800000010000,"key":10,"flowKey":4,"slot":"progress","version":1}',1074065069);
INSERT INTO "updates" VALUES(11,'agent:main:main',4,'done','delivered',NULL,0,NULL,'{"idempotencyKey":"digest-1:done","kind":"done","ownerKey":"agent:main:main","flowId":"digest-1","revision":2,"flowStatus":"succeeded","goal":"send the digest","text":"send the digest: succeeded","data":{"sent":4},"requesterOrigin":{"channel":"slack","to":"C1"},"status":"delivered","attempt":2,"createdAt":1800000010000,"deliveredAt":1800000010005,"key":11,"flowKey":4,"slot":"done"}',1086587083);
INSERT INTO "updates" VALUES(12,'agent:main:main',1,'reminder:1','pending',1800000070000,0,NULL,'{"idempotencyKey":"triage-1:reminder:1","kind":"reminder","ownerKey":"agent:main:main","flowId":"triage-1","revision":2,"flowStatus":"waiting","goal":"triage inbox","text":"Which team?","requesterOrigin":{"channel":"slack","to":"C1"},"createdAt":1800000010000,"dueAt":1800000070000,"key":12,"flowKey":1,"slot":"reminder:1"}',450362190);
INSERT INTO "updates" VALUES(13,'agent:main:main',1,'progress','pending',1800086410000,0,'daily','{"idempotencyKey":"triage-1:progress","kind":"progress","ownerKey":"agent:main:main","flowId":"triage-1","revision":2,"flowStatus":"waiting","goal":"triage inbox","text":"triage inbox: waiting","bucket":"daily","requesterOrigin":{"channel":"slack","to":"C1"},"createdAt":1800000010000,"dueAt":1800086410000,"key":13,"flowKey":1,"slot":"progress"}',1356702675);
CREATE UNIQUE INDEX flows_by_id ON flows (owner_key, flow_id);
CREATE UNIQUE INDEX flows_by_idempotency_key ON flows (owner_key, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX flows_by_owner ON flows (owner_key, key);
CREATE INDEX flows_by_correlation ON flows (owner_key, correlation_id)
    WHERE correlation_id IS NOT NULL;
CREATE INDEX flows_live ON flows (controller_id) WHERE ended_at IS NULL;
CREATE INDEX flows_due ON flows (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX tasks_by_flow ON tasks (flow_key, status, runtime);
CREATE UNIQUE INDEX tasks_by_run ON tasks (flow_key, run_id) WHERE run_id IS NOT NULL;
CREATE INDEX tasks_launched ON tasks (flow_key)
    WHERE launched = 1 AND status IN ('queued', 'running');
CREATE INDEX tasks_due ON tasks (due_at) WHERE due_at IS NOT NULL;
CREATE UNIQUE INDEX events_by_flow ON events (flow_key, seq);
CREATE VIEW v_flows AS SELECT
    flow_id, owner_key, status, revision, controller_id, correlation_id,
    json_extract(record, '$.goal') AS goal,
    json_extract(record, '$.currentStep') AS current_step,
    json_extract(record, '$.stateJson') AS state_json,
    json_extract(record, '$.waitJson') AS wait_json,
    json_extract(record, '$.blockedSummary') AS blocked_summary,
    datetime(json_extract(record, '$.createdAt') / 1000.0, 'unixepoch') AS created,
    datetime(json_extract(record, '$.updatedAt') / 1000.0, 'unixepoch') AS updated,
    datetime(ended_at / 1000.0, 'unixepoch') AS ended
FROM (SELECT *, CASE WHEN json_valid(doc) THEN doc ELSE '{}' END AS record FROM flows);
CREATE VIEW v_history AS SELECT
    f.flow_id, f.owner_key, e.seq, e.position,
    json_extract(e.record, '$.revision') AS revision,
    datetime(json_extract(e.record, '$.at') / 1000.0, 'unixepoch') AS at,
    json_extract(e.record, '$.type') AS type,
    json_extract(e.record, '$.actor') AS actor,
    json_extract(e.record, '$.changed') AS changed
FROM (SELECT *, CASE WHEN json_valid(doc) THEN doc ELSE '{}' END AS record FROM events) AS e
JOIN flows AS f ON f.key = e.flow_key;
CREATE INDEX flows_by_wait ON flows (wait_key, status) WHERE wait_key IS NOT NULL;
CREATE INDEX flows_by_token ON flows (wait_token) WHERE wait_token IS NOT NULL;
CREATE INDEX flows_waiting ON flows (owner_key, key)
    WHERE status IN ('waiting', 'blocked') AND (wait_key IS NOT NULL OR wait_token IS NOT NULL);
CREATE INDEX tasks_by_wait ON tasks (wait_key, status) WHERE wait_key IS NOT NULL;
CREATE INDEX tasks_by_token ON tasks (wait_token) WHERE wait_token IS NOT NULL;
CREATE INDEX tasks_waiting ON tasks (key) WHERE status = 'queued' AND wait_token IS NOT NULL;
CREATE UNIQUE INDEX signals_by_id ON signals (owner_key, signal_id);
CREATE INDEX signals_kept ON signals (wait_key, key) WHERE kept = 1;
CREATE INDEX signals_expiring ON signals (expires_at) WHERE kept = 1;
CREATE UNIQUE INDEX updates_by_slot ON updates (flow_key, slot);
CREATE INDEX updates_by_owner ON updates (owner_key, key);
CREATE INDEX updates_due ON updates (due_at) WHERE status = 'pending' AND bucket IS NULL;
CREATE INDEX digests_due ON updates (due_at) WHERE status = 'pending' AND bucket IS NOT NULL;
CREATE VIEW v_tasks AS SELECT
    f.flow_id, f.owner_key, t.task_id, t.run_id, t.runtime, t.status,
    json_extract(t.record, '$.task') AS task,
    json_extract(t.record, '$.attempt') AS attempt,
    json_extract(t.record, '$.resultJson') AS result_json,
    json_extract(t.record, '$.failure.message') AS failure,
    json_extract(t.record, '$.wait.key') AS waits_for,
    json_extract(t.record, '$.wait.prompt') AS prompt,
    datetime(json_extract(t.record, '$.wait.deadlineAt') / 1000.0, 'unixepoch') AS deadline
FROM (SELECT *, CASE WHEN json_valid(doc) THEN doc ELSE '{}' END AS record FROM tasks) AS t
JOIN flows AS f ON f.key = t.flow_key;
CREATE VIEW v_updates AS SELECT
    f.flow_id, f.owner_key, u.slot, u.status,
    json_extract(u.record, '$.kind') AS kind,
    json_extract(u.record, '$.text') AS text,
    json_extract(u.record, '$.attempt') AS attempt,
    json_extract(u.record, '$.failure') AS failure,
    u.bucket,
    json_extract(u.record, '$.idempotencyKey') AS idempotency_key,
    datetime(json_extract(u.record, '$.createdAt') / 1000.0, 'unixepoch') AS created,
    datetime(u.due_at / 1000.0, 'unixepoch') AS due,
    datetime(json_extract(u.record, '$.deliveredAt') / 1000.0, 'unixepoch') AS delivered
FROM (SELECT *, CASE WHEN json_valid(doc) THEN doc ELSE '{}' END AS record FROM updates) AS u
JOIN flows AS f ON f.key = u.flow_key;
COMMIT;
