with sources as (

    select * from {{ ref('stg_registry__sources') }}

),

files as (

    select
        source_name,
        count(*) as files,
        sum(size_bytes)::bigint as size_bytes,
        sum(rows_in)::bigint as rows_in,
        sum(rows_landed)::bigint as rows_landed,
        sum(rows_refused)::bigint as rows_refused,
        max(landed_at) as last_landed_at
    from {{ ref('stg_registry__source_files') }}
    group by source_name

),

quarantined_rows as (

    select
        source_name,
        count(*) as quarantined_rows
    from {{ ref('stg_quarantine__rows') }}
    where is_open
    group by source_name

),

quarantined_files as (

    select
        source_name,
        count(distinct file) as quarantined_files
    from {{ ref('stg_quarantine__files') }}
    where is_open
    group by source_name

),

documents as (

    select
        source_name,
        count(*) as documents
    from {{ ref('stg_corpus__documents') }}
    group by source_name

),

chunks as (

    select
        source_name,
        count(*) as chunks
    from {{ ref('stg_corpus__chunks') }}
    group by source_name

),

inventory as (

    select
        -- what the contract says
        sources.source_name,
        sources.contract_version,
        sources.owner,
        sources.description,
        sources.kind,
        sources.provenance,
        sources.has_pii,
        sources.allowed_uses,
        sources.location,
        sources.freshness_days,

        -- what was loaded
        files.last_landed_at,
        files.last_landed_at + sources.freshness_days * interval '1 day' as fresh_until,
        coalesce(files.files, 0) as files,
        coalesce(files.size_bytes, 0) as size_bytes,
        coalesce(files.rows_in, 0) as rows_in,
        coalesce(files.rows_landed, 0) as rows_landed,
        coalesce(files.rows_refused, 0) as rows_refused,
        files.rows_refused::double precision / nullif(files.rows_in, 0) as refused_share,

        -- what was refused and still waits
        coalesce(quarantined_rows.quarantined_rows, 0) as quarantined_rows,
        coalesce(quarantined_files.quarantined_files, 0) as quarantined_files,

        -- what became of it
        coalesce(documents.documents, 0) as documents,
        coalesce(chunks.chunks, 0) as chunks

    from sources
    left join files on sources.source_name = files.source_name
    left join quarantined_rows on sources.source_name = quarantined_rows.source_name
    left join quarantined_files on sources.source_name = quarantined_files.source_name
    left join documents on sources.source_name = documents.source_name
    left join chunks on sources.source_name = chunks.source_name

)

select * from inventory
